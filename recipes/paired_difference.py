"""Mean of paired differences and its t interval."""

from __future__ import annotations

__all__ = ["PairedDifference", "paired_difference", "t_quantile"]

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class PairedDifference:
    """Mean of the differences of `count` pairs, in the unit of the values, with the half width of its interval.

    `half_width` is None where one pair, or none, leaves no spread to judge by. `mean` is NaN without pairs.
    """

    count: int
    mean: float
    half_width: float | None

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
    half_width = t_quantile((1 + confidence) / 2, count - 1) * math.sqrt(variance / count)
    return PairedDifference(count, mean, half_width)


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
