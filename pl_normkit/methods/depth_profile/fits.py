"""How the variance of the stream grows with depth: by a constant or by a factor."""

from __future__ import annotations

__all__ = ["Growth", "fit_growth"]

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Growth:
    """Least-squares fits of the variance v_l, l = 1..L.

    Attributes:
        intercept, slope: of v = intercept + slope * l.
        scale, rate: of v = scale * exp(rate * l), fitted to log v.
        linear_error, exponential_error: root mean square of log(fit / v); infinite for a line that is not positive everywhere.
    """

    intercept: float
    slope: float
    scale: float
    rate: float
    linear_error: float
    exponential_error: float

    @property
    def is_exponential(self) -> bool:
        """Whether the exponential fits better, in logarithms."""
        return self.exponential_error < self.linear_error


def fit_growth(variances: Sequence[float]) -> Growth | None:
    """Both fits; None for fewer than three values, or where one is not positive and finite.

    >>> growth = fit_growth([2.0, 4.0, 8.0, 16.0])
    >>> round(growth.scale, 6), round(growth.rate / math.log(2), 6), growth.is_exponential
    (1.0, 1.0, True)
    """
    if len(variances) < 3 or not all(0.0 < value < math.inf for value in variances):
        return None
    logs = [math.log(value) for value in variances]
    intercept, slope = _line(variances)
    start, rate = _line(logs)
    depths = range(1, len(variances) + 1)
    line = [intercept + slope * depth for depth in depths]
    linear = [math.log(value) if value > 0.0 else math.inf for value in line]
    exponential = [start + rate * depth for depth in depths]
    return Growth(intercept, slope, math.exp(start), rate, _rms(linear, logs), _rms(exponential, logs))


def _line(values: Sequence[float]) -> tuple[float, float]:
    middle, mean = (len(values) + 1) / 2, math.fsum(values) / len(values)
    depths = range(1, len(values) + 1)
    slope = math.fsum((depth - middle) * (value - mean) for depth, value in zip(depths, values, strict=True))
    slope /= math.fsum((depth - middle) ** 2 for depth in depths)
    return mean - slope * middle, slope


def _rms(fitted: Sequence[float], seen: Sequence[float]) -> float:
    return math.sqrt(math.fsum((a - b) ** 2 for a, b in zip(fitted, seen, strict=True)) / len(seen))
