"""A run whose first blocks get no gradient: the ratio over depth, followed step by step."""

from __future__ import annotations

__all__ = ["StuckGradients"]

import math
from collections import deque
from statistics import median

CUT = 0.05
WINDOW = 3
"""Readings the median rolls over: at the callback's default of every 10 steps, 30 steps."""


class StuckGradients:
    """Says that a run is stuck when the rolling median of the gradient ratio, first over last quarter of the blocks, falls below 0.05.

    Measured by us on small language models (12 blocks, GPT-2-like and BERT): runs that never learned more than letter frequencies lay
    between 0.019 and 1e-5, those that trained at 0.3 or above. A single reading says little, so the first `window` readings are silent.

    Attributes:
        value: the rolling median, None before `window` readings.

    >>> watch = StuckGradients()
    >>> [watch.add(ratio) for ratio in (0.9, 0.01, 0.02, 0.01)]
    [False, False, True, True]
    """

    def __init__(self, cut: float = CUT, window: int = WINDOW) -> None:
        self.cut = cut
        self.value: float | None = None
        self._readings: deque[float] = deque(maxlen=window)

    def add(self, ratio: float | None) -> bool:
        """Take a reading, which counts unless it is None or NaN, and say whether the run is stuck."""
        if ratio is None or math.isnan(ratio):
            return False
        self._readings.append(ratio)
        if len(self._readings) == self._readings.maxlen:
            self.value = median(self._readings)
        return self.value is not None and self.value < self.cut
