"""95 % intervals: of means, correlations, Fréchet distances and win rates.

Means, correlations   percentiles of 2000 bootstrap samples of pictures, drawn with replacement, seed 0
Fréchet distances     samples with replacement repeat pictures, which moves sets apart: their percentiles may not even
                      hold the distance itself. Instead, 40 random halves without replacement, and the other halves.
                      With F of all pictures, h and k of the two halves, V[] over the draws:
                      variance of F  V[(h-k)/2] - V[(h+k)/2]; the second-order term is 4 times too large in the first,
                                     twice in the other
                      bias of F      mean h - F: it is c/N to first order, in the halves 2c/N
Coverage              tests/test_intervals.py: of Gaussians with a known distance and more pictures than dimensions, the
                      interval holds the known distance in 91 to 98 % of draws, and in up to all where it is smaller
                      than the bias. With fewer pictures it holds what other sets of as many give: the bias stays
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

DRAWS, SPLITS = 2000, 40
Z = 1.959964  # a normal variable is within ± Z in 95 % of cases


def percentiles(values: Sequence[float]) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - 0.95) / 2, (1 + 0.95) / 2])
    return float(low), float(high)


def bootstrap(statistic: Callable, x: Sequence[float], y: Sequence[float], draws: int = DRAWS) -> tuple[float, float]:
    """The 95 % percentile interval of a correlation over resampled pairs; samples of equal numbers are skipped."""
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    statistic(x, y)  # raises on invalid lists
    rng = np.random.default_rng(0)
    samples = (rng.integers(0, len(x), len(x)) for _ in range(draws))
    pairs = ((x[sample], y[sample]) for sample in samples)
    return percentiles([statistic(a, b) for a, b in pairs if a.min() < a.max() and b.min() < b.max()])


def bootstrap_rows(statistic: Callable[[np.ndarray], float], rows: Sequence, draws: int = DRAWS) -> tuple[float, float]:
    """The 95 % percentile interval of statistic(rows), (N,) or (N, K), over resampled rows; NaN of fewer than two."""
    rows, rng = np.asarray(rows, dtype=np.float64), np.random.default_rng(0)
    if len(rows) < 2:
        return math.nan, math.nan
    return percentiles([statistic(rows[rng.integers(0, len(rows), len(rows))]) for _ in range(draws)])


class Halves(NamedTuple):
    """A statistic without its first-order bias, and the half width of its 95 % interval."""

    unbiased: float
    reach: float


def of_halves(statistic: Callable[..., float], sets: Sequence[np.ndarray], whole: float,
              splits: int = SPLITS) -> Halves:
    """The bias and the interval of whole = statistic(*sets), from random halves of each set.

    sets    pictures on the first axis, at least four; what belongs to one picture stays together
    """
    rng, values = np.random.default_rng(0), np.empty((splits, 2))
    for k in range(splits):
        orders = [rng.permutation(len(one)) for one in sets]
        for side in (0, 1):
            parts = [order[side * (len(order) // 2) :][: len(order) // 2] for order in orders]
            values[k, side] = statistic(*(one[part] for one, part in zip(sets, parts, strict=True)))
    across, along = np.square(values[:, 0] - values[:, 1]).mean() / 4, values.mean(1).var(ddof=1)
    variance = max(across - along, across / 2)
    if not variance:
        return Halves(2 * whole - float(values.mean()), 0.0)
    # the variance is itself a difference of two estimates: Satterthwaite's degrees of freedom, Student's quantile
    freedom = variance**2 / (across**2 / splits + along**2 / (splits - 1))
    quantile = Z + (Z**3 + Z) / (4 * freedom) + (5 * Z**5 + 16 * Z**3 + 3 * Z) / (96 * freedom**2)
    return Halves(2 * whole - float(values.mean()), quantile * math.sqrt(variance))


def wilson(wins: int, trials: int) -> tuple[float, float]:
    """The 95 % interval of a binomial rate (Wilson's); NaN without trials."""
    if not trials:
        return math.nan, math.nan
    rate, extra = wins / trials, Z**2 / trials
    centre, reach = rate + extra / 2, Z * math.sqrt(rate * (1 - rate) / trials + extra / (4 * trials))
    return max(0.0, (centre - reach) / (1 + extra)), min(1.0, (centre + reach) / (1 + extra))
