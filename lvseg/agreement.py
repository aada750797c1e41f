"""How well measurements agree with the truth over patients, with the uncertainty of every number.

An error is predicted minus true: positive is too much. Patients are the unit of sampling: several scans of one patient
count as several measurements but are drawn, and counted in degrees of freedom, together. Intervals are two-sided at
95 %, and None where the patients are too few for them:

- mean error (bias) and its standard deviation, limits of agreement: exact for normal errors of one scan a patient
  (Student's t, chi-squared, non-central t: Carkeet, Optom Vis Sci 2015, 92:e71), and MOVER for several (Zou, Stat
  Methods Med Res 2013, 22:630), with the deviation's by Satterthwaite (Biometrics Bull 1946, 2:110) where so few
  patients have several that they tell less of the variance within patients than all tell of that between;
- other means, concordance, ICC: bootstrap-t over patients (Efron and Tibshirani 1993, chapter 12), the two coefficients
  on Fisher's z scale, with standard errors from influence functions;
- the same where one patient makes more than half of a number's variance: BCa (Efron, J Am Stat Assoc 1987, 82:171),
  since resamples without that patient divide by next to nothing;
- medians, and means of which more than five resamples in a thousand have no spread, since nearly all patients have one
  value: percentiles of the same bootstrap;
- shares: Wilson's score interval, of several scans a patient with the effective number of scans (Korn and Graubard,
  Surv Methodol 1998, 24:193);
- largest errors: none, since a sample says nothing of how much larger the next one may be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse, stats

Array = npt.NDArray[np.float64]
Interval = list[float] | None

LEVEL = 0.95
TAILS = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)
# Bland and Altman's limits hold 95 % of normally distributed errors; the report's equations 2 and 3.
LIMITS_OF_AGREEMENT_SD = 1.96
# The report counts the patients whose relative error is less than this.
CLOSE_PERCENT = 5.0
RESAMPLES = 4000
LIMITS = ("bias", "sd", "limit_of_agreement_lower", "limit_of_agreement_upper")
LEAST_PATIENTS = 5  # fewer have too few different resamples for a bootstrap to mean anything
MOST_WITHOUT_SPREAD = 0.005  # of the resamples, for a bootstrap-t interval
MOST_OF_ONE = 0.5  # of a number's variance that one patient may make, for a bootstrap-t interval
NOTHING = 1e-7  # of a standard error that is zero but for rounding, relatively
AT_A_TIME = 2**20  # weights, of as many resamples as that makes

# A statistic as a function of the scans' weights [resamples, scans]: its value and its influence function.
Statistic = Callable[[Array], tuple[Array, Array]]


class Bootstrap:
    """Resamples of patients, the same for every number of a study, so that its numbers stand on one ground.

    Args:
        patients: a name for each scan; seed: of the draws; resamples: how many.
    """

    def __init__(self, patients: Sequence[str], seed: int = 0, resamples: int = RESAMPLES) -> None:
        self.names = list(patients)
        unique, owner = np.unique(np.asarray(self.names, str), return_inverse=True)
        self.patients = len(unique)
        self.scans = len(owner)
        self._member = sparse.csr_array(
            (np.ones(self.scans), (owner, np.arange(self.scans))), shape=(self.patients, self.scans)
        )
        if self.patients >= LEAST_PATIENTS:
            drawn = np.random.default_rng(seed).multinomial(
                self.patients, np.full(self.patients, 1 / self.patients), size=resamples
            )
            self._times = drawn.astype(np.uint16)  # [resamples, patients]

    def t_interval(self, statistic: Statistic, low: float = -np.inf, high: float = np.inf) -> Interval:
        """The bootstrap-t interval of a statistic, cut to what the number can be at all."""
        if self.patients < LEAST_PATIENTS:
            return None
        value, error, own = self._value_and_error(statistic, np.ones((1, self.patients)))
        if not np.isfinite(value[0]):
            return None
        parts = [self._value_and_error(statistic, times) for times in self._resamples()]
        values, errors = (np.concatenate(part) for part in zip(*(part[:2] for part in parts), strict=True))
        finite = np.isfinite(values)
        if error[0] <= NOTHING * max(1.0, abs(value[0])):  # all scans alike
            return [float(value[0])] * 2
        usable = finite & (errors > NOTHING * error[0])
        if usable.mean() < 1 - MOST_WITHOUT_SPREAD:
            if not finite.any():
                return None
            lower, upper = np.quantile(values[finite], TAILS)
        elif (own**2).max() > MOST_OF_ONE * (own**2).sum():
            lower, upper = np.quantile(values[finite], _bca_levels(values[finite], value[0], own[0]))
        else:
            t = (values[usable] - value[0]) / errors[usable]
            lower, upper = value[0] - np.quantile(t, TAILS[::-1]) * error[0]
        return [float(max(lower, low)), float(min(upper, high))]

    def percentile_interval(self, statistic: Callable[[Array], Array]) -> Interval:
        """The percentiles of a statistic over the resamples."""
        if self.patients < LEAST_PATIENTS:
            return None
        values = np.concatenate([statistic(times @ self._member) for times in self._resamples()])
        return [float(bound) for bound in np.quantile(values, TAILS)]

    def _resamples(self) -> Iterator[Array]:
        """How often each patient was drawn, float [some resamples, patients], so that memory stays small."""
        step = max(1, AT_A_TIME // self.scans)
        for first in range(0, len(self._times), step):
            yield self._times[first : first + step].astype(np.float64)

    def _value_and_error(self, statistic: Statistic, times: Array) -> tuple[Array, Array, Array]:
        """Of each resample the statistic, its standard error, and what each patient moves it by."""
        weights = times @ self._member
        value, influence = statistic(weights)
        with np.errstate(invalid="ignore"):  # a resample without spread has no coefficient
            own = (self._member @ influence.T).T  # a patient's scans move the number together
            variance = (times * own**2).sum(axis=1) / weights.sum(axis=1) ** 2
            return value, np.sqrt(variance * self.patients / (self.patients - 1)), own


def _bca_levels(values: Array, value: float, influence: Array) -> Array:
    """Which quantiles of the resamples are the interval's ends, given bias and skewness."""
    bias = stats.norm.ppf(((values < value).mean() + (values <= value).mean()) / 2)
    acceleration = (influence**3).sum() / (6 * (influence**2).sum() ** 1.5)
    z = bias + stats.norm.ppf(TAILS)
    return np.asarray(stats.norm.cdf(bias + z / (1 - acceleration * z)))


def mean_of(values: Array) -> Statistic:
    """The mean as a statistic of weights."""

    def statistic(weights: Array) -> tuple[Array, Array]:
        mean = weights @ values / weights.sum(axis=1)
        return mean, values - mean[:, None]

    return statistic


def median_of(values: Array) -> Callable[[Array], Array]:
    """The median as a function of weights; between two values, their mean."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]

    def statistic(weights: Array) -> Array:
        share = np.cumsum(weights[:, order], axis=1) / weights.sum(axis=1, keepdims=True)
        below = (share < 0.5).sum(axis=1)
        above = (share <= 0.5).sum(axis=1)
        return (ordered[below] + ordered[np.minimum(above, len(ordered) - 1)]) / 2

    return statistic


def _z(coefficient: Array, influence: Array) -> tuple[Array, Array]:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.arctanh(coefficient), influence / (1 - coefficient[:, None] ** 2)


def _moments(weights: Array, x: Array, y: Array) -> tuple[Array, Array, Array, Array, Array]:
    total = weights.sum(axis=1)
    mean_x, mean_y = weights @ x / total, weights @ y / total
    return (
        mean_x,
        mean_y,
        weights @ x**2 / total - mean_x**2,
        weights @ y**2 / total - mean_y**2,
        weights @ (x * y) / total - mean_x * mean_y,
    )


def _concordance_of(x: Array, y: Array) -> Statistic:
    def statistic(weights: Array) -> tuple[Array, Array]:
        mean_x, mean_y, var_x, var_y, cov = _moments(weights, x, y)
        shift = mean_x - mean_y
        spread = var_x + var_y + shift**2
        own_x, own_y = x - mean_x[:, None], y - mean_y[:, None]
        moved = own_x**2 + own_y**2 + 2 * shift[:, None] * (own_x - own_y) + (shift**2)[:, None]
        with np.errstate(divide="ignore", invalid="ignore"):
            coefficient = 2 * cov / spread
            influence = (2 * own_x * own_y - coefficient[:, None] * moved) / spread[:, None]
        return coefficient, influence

    return statistic


def _icc_of(x: Array, y: Array) -> Statistic:
    """Its influence function is Lin's: the two coefficients differ by a part in the number of scans."""
    lin = _concordance_of(x, y)

    def statistic(weights: Array) -> tuple[Array, Array]:
        mean_x, mean_y, var_x, var_y, cov = _moments(weights, x, y)
        n = weights.sum(axis=1)
        unbiased = n / (n - 1)
        between, within = unbiased * (var_x + var_y + 2 * cov) / 2, unbiased * (var_x + var_y - 2 * cov) / 2
        raters = n * (mean_x - mean_y) ** 2 / 2
        with np.errstate(divide="ignore", invalid="ignore"):
            coefficient = (between - within) / (between + within + 2 / n * (raters - within))
        return coefficient, lin(weights)[1]

    return statistic


def concordance(predicted: npt.ArrayLike, true: npt.ArrayLike) -> float | None:
    """Lin's concordance correlation coefficient (Biometrics 1989, 45:255, variances with n).

    Args:
        predicted: float [scans]; true: float [scans], same unit and order.

    Returns:
        None for one scan, or without any spread.
    """
    x, y = np.asarray(predicted, np.float64), np.asarray(true, np.float64)
    if not _has_spread(x, y):
        return None
    return float(_concordance_of(*_centred(x, y))(np.ones((1, x.size)))[0][0])


def icc_a1(predicted: npt.ArrayLike, true: npt.ArrayLike) -> float | None:
    """ICC(A,1): two-way model, absolute agreement, single measurement (McGraw and Wong, Psychol Methods 1996, 1:30).

    Args:
        predicted: float [scans]; true: float [scans], same unit and order.

    Returns:
        None for one scan, without any spread, or for two scans whose numbers changed places, of which it is -infinite.
    """
    x, y = np.asarray(predicted, np.float64), np.asarray(true, np.float64)
    if not _has_spread(x, y):
        return None
    between, within = 2 * np.var((x + y) / 2, ddof=1), np.var(x - y, ddof=1) / 2
    raters = x.size * (x - y).mean() ** 2 / 2
    spread = between + within + 2 / x.size * (raters - within)
    return float((between - within) / spread) if spread > 1e-12 * within else None


def _has_spread(x: Array, y: Array) -> bool:
    return x.size > 1 and bool(np.ptp(x) or np.ptp(y) or (x != y).any())


def _centred(x: Array, y: Array) -> tuple[Array, Array]:
    """Both less one number, which changes no coefficient and keeps sums of squares exact."""
    middle = (x.mean() + y.mean()) / 2
    return x - middle, y - middle


def _coefficient_interval(bootstrap: Bootstrap, statistic: Statistic, value: float | None) -> Interval:
    if value is None:
        return None
    if value >= 1:
        return [1.0, 1.0]
    bounds = bootstrap.t_interval(lambda weights: _z(*statistic(weights)))
    if bounds is None or bounds[0] == bounds[1]:  # one of both has no spread, so that every resample has 0
        return None
    return [float(np.tanh(bound)) for bound in bounds]


def limits_of_agreement(errors: npt.ArrayLike, patients: Sequence[str]) -> dict[str, Any]:
    """Bland and Altman's bias and 95 % limits of agreement with their intervals.

    Args:
        errors: float [scans], predicted minus true.
        patients: a name for each scan.

    Returns:
        bias; sd (n - 1 for one scan a patient; the square root of the variances between and within patients for
        several); limit_of_agreement_lower, limit_of_agreement_upper; `intervals` of all four. For one patient all but
        bias is None.
    """
    values = np.asarray(errors, np.float64)
    _, owner, scans = np.unique(np.asarray(patients), return_inverse=True, return_counts=True)
    n = len(scans)
    means = np.bincount(owner, values) / scans
    bias = float(means.mean())
    if n < 2:
        return {**dict.fromkeys(LIMITS), "bias": bias, "intervals": dict.fromkeys(LIMITS)}
    of_means = float(means.var(ddof=1))
    bias_half = float(stats.t.ppf(TAILS[1], n - 1)) * np.sqrt(of_means / n)
    if values.size == n:
        sd = np.sqrt(of_means)
        sd_bounds = sd * np.sqrt((n - 1) / stats.chi2.ppf(TAILS[::-1], n - 1))
        # The outer and inner bound of a limit that lies 1.96 true deviations from the true mean.
        inner, outer = stats.nct.ppf(TAILS, n - 1, LIMITS_OF_AGREEMENT_SD * np.sqrt(n)) * sd / np.sqrt(n)
        lower, upper = [bias - outer, bias - inner], [bias + inner, bias + outer]
    else:
        sd, sd_bounds = _total_deviation(values - means[owner], of_means, scans)
        half = LIMITS_OF_AGREEMENT_SD * sd
        inner = np.hypot(bias_half, half - LIMITS_OF_AGREEMENT_SD * sd_bounds[0])
        outer = np.hypot(bias_half, LIMITS_OF_AGREEMENT_SD * sd_bounds[1] - half)
        lower = [bias - half - outer, bias - half + inner]
        upper = [bias + half - inner, bias + half + outer]
    return {
        "bias": bias,
        "sd": float(sd),
        "limit_of_agreement_lower": bias - LIMITS_OF_AGREEMENT_SD * float(sd),
        "limit_of_agreement_upper": bias + LIMITS_OF_AGREEMENT_SD * float(sd),
        "intervals": {
            "bias": [bias - bias_half, bias + bias_half],
            "sd": [float(bound) for bound in sd_bounds],
            "limit_of_agreement_lower": [float(bound) for bound in lower],
            "limit_of_agreement_upper": [float(bound) for bound in upper],
        },
    }


def _total_deviation(residuals: Array, of_means: float, scans: npt.NDArray[np.int_]) -> tuple[float, Array]:
    """The standard deviation of one measurement where patients have several, and its interval (module docstring)."""
    n, freedom = len(scans), int(scans.sum()) - len(scans)
    within_share = 1 - float((1 / scans).mean())
    within = float((residuals**2).sum()) / freedom
    variance = of_means + within_share * within
    if freedom < n - 1:  # one patient scanned twice would make MOVER's interval three times as wide as without
        between = of_means / variance if variance else 1.0
        known = 1 / (between**2 / (n - 1) + (1 - between) ** 2 / freedom)
        return float(np.sqrt(variance)), np.sqrt(variance * known / stats.chi2.ppf(TAILS[::-1], known))
    chi_means, chi_within = stats.chi2.ppf(TAILS[::-1], n - 1), stats.chi2.ppf(TAILS[::-1], freedom)
    parts = np.hypot(of_means * (1 - (n - 1) / chi_means), within_share * within * (1 - freedom / chi_within))
    return float(np.sqrt(variance)), np.sqrt(np.maximum(variance + np.array([-1, 1]) * parts, 0))


def wilson(successes: int, trials: int) -> Interval:
    """Wilson's score interval of a share (J Am Stat Assoc 1927, 22:209); None without trials."""
    if not trials:
        return None
    bounds = stats.binomtest(successes, trials).proportion_ci(LEVEL, method="wilson")
    return [float(bounds.low), float(bounds.high)]


def share(is_so: npt.ArrayLike, patients: Sequence[str] | None = None) -> tuple[float | None, Interval]:
    """A share of scans with Wilson's interval, for several scans a patient with the effective number of scans.

    Args:
        is_so: bool [scans]; patients: a name for each scan; None for a patient each.

    Returns:
        The share (None without scans) and its interval (None without scans, or with several of one patient alone).
    """
    values = np.asarray(is_so, np.float64)
    n, hits = values.size, int(values.sum())
    names = np.arange(n) if patients is None else np.asarray(patients)
    _, owner = np.unique(names, return_inverse=True)
    count = int(owner.max()) + 1 if n else 0
    if count == n:
        return (hits / n if n else None), wilson(hits, n)
    if count == 1:
        return hits / n, None
    of_all = hits / n
    own = np.bincount(owner, values - of_all)
    variance = count / (count - 1) * float((own**2).sum()) / n**2
    effective = min(n, of_all * (1 - of_all) / variance) if variance > 0 else count
    effective *= float(stats.t.ppf(TAILS[1], n - 1) / stats.t.ppf(TAILS[1], count - 1)) ** 2
    z2 = float(stats.norm.ppf(TAILS[1])) ** 2
    middle = (of_all + z2 / (2 * effective)) / (1 + z2 / effective)
    half = np.sqrt(z2 * (of_all * (1 - of_all) / effective + z2 / (4 * effective**2))) / (1 + z2 / effective)
    return of_all, [float(max(middle - half, 0)), float(min(middle + half, 1))]


def average(values: npt.ArrayLike, bootstrap: Bootstrap, low: float = -np.inf, high: float = np.inf) -> dict[str, Any]:
    """Mean, median, sd (n - 1), minimum and maximum of one number a scan, with intervals of mean and median.

    Args:
        values: float [scans]; bootstrap: of their patients; low, high: what the number can be at all.
    """
    numbers = np.asarray(values, np.float64)
    return {
        "mean": float(numbers.mean()),
        "median": float(np.median(numbers)),
        "sd": float(numbers.std(ddof=1)) if numbers.size > 1 else None,
        "minimum": float(numbers.min()),
        "maximum": float(numbers.max()),
        "intervals": {
            "mean": bootstrap.t_interval(mean_of(numbers), low, high),
            "median": bootstrap.percentile_interval(median_of(numbers)),
        },
    }


def agreement(
    predicted: npt.ArrayLike,
    true: npt.ArrayLike,
    patients: Sequence[str] | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> dict[str, Any]:
    """Agreement of one number a scan, such as liver volumes in ml, with the truth.

    Args:
        predicted: float [scans].
        true: float [scans], same unit and order.
        patients: a name for each scan; None for a patient each.
        seed, resamples: of the bootstrap.

    Returns:
        Plain numbers, in the unit that came in where the name says no other: n (scans), patients;
        bias, sd, limit_of_agreement_lower, limit_of_agreement_upper (`limits_of_agreement`); mean_absolute_error;
        concordance (Lin's), icc_a1; and, over the n_percent scans whose true number is above zero, in percent of it
        (None where there are none): the first four again with _percent, mean_absolute_error_percent,
        median_absolute_error_percent, median_error_percent (signed), largest_error_percent (absolute) and
        share_within_5_percent (0 to 1, of errors less than 5 %). `intervals` holds [lower, upper] under the same names.

    Raises:
        ValueError: for no scans, lengths that differ, or numbers that are not finite.
    """
    x, y = _pairs(predicted, true)
    names = [str(index) for index in range(x.size)] if patients is None else list(patients)
    bootstrap = Bootstrap(names, seed, resamples)
    centred = _centred(x, y)
    limits = limits_of_agreement(x - y, names)
    lin, icc = concordance(x, y), icc_a1(x, y)
    above = np.flatnonzero(y > 0)
    own = bootstrap if above.size == x.size else Bootstrap([names[index] for index in above], seed, resamples)
    relative = _relative(100 * (x - y)[above] / y[above], own)
    intervals = {
        **limits.pop("intervals"),
        "mean_absolute_error": bootstrap.t_interval(mean_of(np.abs(x - y)), low=0),
        "concordance": _coefficient_interval(bootstrap, _concordance_of(*centred), lin),
        "icc_a1": _coefficient_interval(bootstrap, _icc_of(*centred), icc),
        **relative.pop("intervals"),
    }
    return {
        "n": x.size,
        "patients": bootstrap.patients,
        **limits,
        "mean_absolute_error": float(np.abs(x - y).mean()),
        "concordance": lin,
        "icc_a1": icc,
        **relative,
        "intervals": intervals,
    }


def _relative(percent: Array, bootstrap: Bootstrap) -> dict[str, Any]:
    """The part of `agreement` in percent of the true number; None throughout where no true number is above 0."""
    limits = limits_of_agreement(percent, bootstrap.names) if percent.size else {"intervals": {}}
    size = np.abs(percent)
    close, close_bounds = share(size < CLOSE_PERCENT, bootstrap.names)
    found = {f"{name}_percent": limits.get(name) for name in LIMITS}
    intervals = {f"{name}_percent": limits["intervals"].get(name) for name in LIMITS}
    if percent.size:
        found |= {
            "mean_absolute_error_percent": float(size.mean()),
            "median_absolute_error_percent": float(np.median(size)),
            "median_error_percent": float(np.median(percent)),
            "largest_error_percent": float(size.max()),
            "share_within_5_percent": close,
        }
        intervals |= {
            "mean_absolute_error_percent": bootstrap.t_interval(mean_of(size), low=0),
            "median_absolute_error_percent": bootstrap.percentile_interval(median_of(size)),
            "median_error_percent": bootstrap.percentile_interval(median_of(percent)),
            "share_within_5_percent": close_bounds,
        }
    else:
        found |= dict.fromkeys((
            "mean_absolute_error_percent", "median_absolute_error_percent", "median_error_percent",
            "largest_error_percent", "share_within_5_percent",
        ))  # fmt: skip
    return {"n_percent": percent.size, **found, "intervals": intervals}


def detection(
    predicted: npt.ArrayLike, true: npt.ArrayLike, threshold: float, patients: Sequence[str] | None = None
) -> dict[str, Any]:
    """Sensitivity and specificity of "at or above the threshold", such as steatosis at 5.56 % fat.

    Args:
        predicted: float [scans].
        true: float [scans], same unit and order.
        threshold: in that unit.
        patients: a name for each scan; None for a patient each.

    Returns:
        threshold; true_positive, false_negative, true_negative, false_positive (scans); sensitivity, specificity, from
        0 to 1 (None without positives or negatives); `intervals` of both (`share`).

    Raises:
        ValueError: as `agreement`.
    """
    x, y = _pairs(predicted, true)
    found, is_so = x >= threshold, y >= threshold
    names = [str(index) for index in range(x.size)] if patients is None else list(patients)
    (sensitivity, of_sensitivity), (specificity, of_specificity) = (
        share((found == is_so)[chosen], [names[index] for index in np.flatnonzero(chosen)])
        for chosen in (is_so, ~is_so)
    )
    return {
        "threshold": float(threshold),
        "true_positive": int((found & is_so).sum()),
        "false_negative": int((~found & is_so).sum()),
        "true_negative": int((~found & ~is_so).sum()),
        "false_positive": int((found & ~is_so).sum()),
        "sensitivity": sensitivity,
        "specificity": specificity,
        "intervals": {"sensitivity": of_sensitivity, "specificity": of_specificity},
    }


def same_class(
    predicted: Sequence[int], true: Sequence[int], *, classes: int, patients: Sequence[str] | None = None
) -> dict[str, Any]:
    """How often a class, such as a grade of steatosis, is the true one.

    Args:
        predicted: int [scans], from 0 to classes - 1; true: int [scans], same order; classes: number.
        patients: a name for each scan; None for a patient each.

    Returns:
        counts (int [true class][predicted class]), share_equal, and `intervals` of it (`share`).
    """
    counts = np.zeros((classes, classes), int)
    np.add.at(counts, (np.asarray(true, int), np.asarray(predicted, int)), 1)
    equal, bounds = share(np.asarray(true) == np.asarray(predicted), patients)
    return {"counts": counts.tolist(), "share_equal": equal, "intervals": {"share_equal": bounds}}


def paired_difference(
    first: npt.ArrayLike,
    second: npt.ArrayLike,
    patients: Sequence[str],
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> dict[str, Any]:
    """Whether one of two runs does better on the same scans: mean difference, second minus first, and Wilcoxon's test.

    Args:
        first: float [scans], such as Dice or absolute errors.
        second: float [scans], same scans and order.
        patients: a name for each scan.
        seed, resamples: of the bootstrap.

    Returns:
        n (scans), patients; mean_difference and median_difference with `intervals` (bootstrap-t and percentiles);
        higher, equal, lower (patients whose mean of second is so); wilcoxon_p, two-sided, of the patients' mean
        differences (1.0 if all are zero; signed ranks, zeros left out as Wilcoxon did).

    Raises:
        ValueError: as `agreement`.
    """
    x, y = _pairs(second, first)
    differences = x - y
    bootstrap = Bootstrap(patients, seed, resamples)
    _, owner, scans = np.unique(np.asarray(patients), return_inverse=True, return_counts=True)
    own = np.bincount(owner, differences) / scans
    # Equal but for the last digits of binary fractions is equal: ranks would see a difference.
    own = np.round(own / max(float(np.abs(own).max()), 1e-300), 9)
    return {
        "n": x.size,
        "patients": bootstrap.patients,
        "mean_difference": float(differences.mean()),
        "median_difference": float(np.median(differences)),
        "higher": int((own > 0).sum()),
        "equal": int((own == 0).sum()),
        "lower": int((own < 0).sum()),
        "wilcoxon_p": float(stats.wilcoxon(own[own != 0]).pvalue) if own.any() else 1.0,
        "intervals": {
            "mean_difference": bootstrap.t_interval(mean_of(differences)),
            "median_difference": bootstrap.percentile_interval(median_of(differences)),
        },
    }


def _pairs(predicted: npt.ArrayLike, true: npt.ArrayLike) -> tuple[Array, Array]:
    predictions, truths = np.asarray(predicted, np.float64), np.asarray(true, np.float64)
    if predictions.ndim != 1 or predictions.shape != truths.shape or not predictions.size:
        raise ValueError(f"Expected two numbers for each scan, received {predictions.shape} and {truths.shape}.")
    if not (np.isfinite(predictions).all() and np.isfinite(truths).all()):
        raise ValueError(f"Expected finite numbers, received predicted={predictions} and true={truths}.")
    return predictions, truths
