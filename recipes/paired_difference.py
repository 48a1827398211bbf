"""Mean of paired differences: its t interval, its p value (by Holm where there are several), and what could have been shown."""

from __future__ import annotations

__all__ = ["PairedDifference", "holm", "paired_difference", "power_of", "smallest_shown", "t_quantile", "two_sided_p"]

import math
from collections.abc import Sequence
from dataclasses import dataclass

POWER = 0.8
"""Of ten comparisons with a real effect of the size that `smallest_shown` gives, eight show it."""


@dataclass(frozen=True)
class PairedDifference:
    """Mean of the differences of `count` pairs, in the unit of the values, with the half width of its interval.

    `half_width`, `spread` (standard deviation of the differences) and `p` (two-sided, paired t test) are None where one pair, or none,
    leaves no spread to judge by. `mean` is NaN without pairs.
    """

    count: int
    mean: float
    half_width: float | None
    spread: float | None = None
    p: float | None = None

    @property
    def low(self) -> float:
        """Lower end of the interval; NaN without one."""
        return self.mean - self.half_width if self.half_width is not None else math.nan

    @property
    def high(self) -> float:
        """Upper end of the interval; NaN without one."""
        return self.mean + self.half_width if self.half_width is not None else math.nan


def paired_difference(without: Sequence[float], with_it: Sequence[float], confidence: float = 0.95) -> PairedDifference:
    """Mean of `with_it[i] - without[i]` and Student's interval around it; pairs with a value that is not finite are left out."""
    pairs = [(before, after) for before, after in zip(without, with_it, strict=True) if math.isfinite(before) and math.isfinite(after)]
    differences = [after - before for before, after in pairs]
    count = len(differences)
    if not count:
        return PairedDifference(0, math.nan, None)
    mean = math.fsum(differences) / count
    if count == 1:
        return PairedDifference(1, mean, None)
    variance = math.fsum((difference - mean) ** 2 for difference in differences) / (count - 1)
    error = math.sqrt(variance / count)
    half_width = t_quantile((1 + confidence) / 2, count - 1) * error
    p = two_sided_p(mean / error, count - 1) if error else float(mean == 0)
    return PairedDifference(count, mean, half_width, math.sqrt(variance), p)


def holm(values: Sequence[float]) -> list[float]:
    """The p values of a family of tests, adjusted: one below alpha keeps the chance of any false alarm in the family below alpha.

    Source: Holm 1979, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 6.
    """
    order = sorted(range(len(values)), key=values.__getitem__)
    adjusted, largest = [0.0] * len(values), 0.0
    for place, index in enumerate(order):
        largest = max(largest, min(1.0, (len(values) - place) * values[index]))
        adjusted[index] = largest
    return adjusted


def smallest_shown(spread: float, count: int, alpha: float = 0.05, power: float = POWER) -> float:
    """The smallest mean difference that a t test of `count` pairs with this spread shows at level `alpha` with probability `power`."""
    low, high = 0.0, 1.0
    while power_of(high, count, alpha) < power:
        high *= 2
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if power_of(middle, count, alpha) < power else (low, middle)
    return high * spread


def power_of(effect: float, count: int, alpha: float = 0.05) -> float:
    """The chance that a two-sided paired t test at level `alpha` rejects, for a true mean of `effect` standard deviations.

    Given the estimated spread, u times the true one, it rejects where a normal variable leaves +-t u; the mean over u, whose square is
    chi-squared over its degrees of freedom, by Simpson's rule.
    """
    freedom, steps = count - 1, 600
    shift, bound = effect * math.sqrt(count), t_quantile(1 - alpha / 2, freedom)
    top = 1 + 10 / math.sqrt(2 * freedom)
    scale = math.log(2) + freedom / 2 * math.log(freedom / 2) - math.lgamma(freedom / 2)
    total = 0.0
    for step in range(steps + 1):
        x = step / steps
        u = top * x * x  # closer together near 0, where few pairs have all that bends
        logarithm = (freedom - 1) * math.log(u) if u else (0.0 if freedom == 1 else -math.inf)
        density = math.exp(scale + logarithm - freedom / 2 * u * u) * 2 * top * x
        weight = 1 if step in (0, steps) else 4 if step % 2 else 2
        total += weight * density * (_normal(shift - bound * u) + _normal(-shift - bound * u))
    return total / steps / 3


def _normal(value: float) -> float:
    return math.erfc(-value / math.sqrt(2)) / 2


def two_sided_p(t: float, freedom: int) -> float:
    """P(|T| >= |t|) of Student's t with `freedom` degrees of freedom."""
    return max(0.0, 1 - _two_sided(math.atan(abs(t) / math.sqrt(freedom)), freedom))


def t_quantile(probability: float, freedom: int) -> float:
    """The value below which Student's t with `freedom` degrees of freedom stays with `probability`, in (0.5, 1).

    Source: Abramowitz and Stegun, 26.7.3 and 26.7.4, solved by bisection over the angle atan(t / sqrt(freedom)).
    """
    low, high = 0.0, math.pi / 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _two_sided(middle, freedom) < 2 * probability - 1 else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def _two_sided(angle: float, freedom: int) -> float:
    """P(|t| < sqrt(freedom) * tan(angle))."""
    sine, cosine = math.sin(angle), math.cos(angle)
    term, total = (cosine, 0.0) if freedom % 2 else (1.0, 0.0)
    for index in range(freedom % 2, freedom - 1, 2):
        total += term
        term *= cosine**2 * (index + 1) / (index + 2)
    return 2 / math.pi * (angle + sine * total) if freedom % 2 else sine * total
