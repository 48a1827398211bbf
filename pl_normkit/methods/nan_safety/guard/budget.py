"""How many steps may be skipped, and when a finite gradient is a spike. Plain numbers. Derived here."""

from __future__ import annotations

__all__ = ["SkipBudget", "SpikeWatch"]

import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class SkipBudget:
    """How many skipped steps are tolerated.

    Attributes:
        in_a_row: most skips without a good step between them; None sets no limit.
        per_1000: most skips among the last 1,000 steps; None sets no limit.
        steps: steps seen.
        skips: skips seen.
    """

    in_a_row: int | None = None
    per_1000: int | None = None
    steps: int = 0
    skips: int = 0
    row: int = 0
    recent: deque[int] = field(default_factory=deque)

    def count(self, *, skipped: bool) -> None:
        self.steps += 1
        self.row = self.row + 1 if skipped else 0
        if skipped:
            self.skips += 1
            self.recent.append(self.steps)
        while self.recent and self.recent[0] <= self.steps - 1000:
            self.recent.popleft()

    def exceeded(self) -> str:
        """Which limit is passed, in words; "" while none is."""
        if self.in_a_row is not None and self.row > self.in_a_row:
            return f"{self.row} steps in a row were skipped; max_skips is {self.in_a_row}"
        if self.per_1000 is not None and len(self.recent) > self.per_1000:
            return f"{len(self.recent)} of the last 1,000 steps were skipped; max_skips_per_1000 is {self.per_1000}"
        return ""

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "skips": self.skips, "row": self.row, "recent": list(self.recent)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps, self.skips, self.row = state["steps"], state["skips"], state["row"]
        self.recent = deque(state["recent"])


class SpikeWatch:
    """Gradient norms far above their running median, of each optimizer by itself.

    The median is over the last `WINDOW` norms, spikes among them, so that a lasting rise is a new normal after half a window.
    """

    WINDOW, FIRST = 100, 10

    def __init__(self, factor: float | None) -> None:
        self.factor = factor
        self.norms: dict[int, deque[float]] = {}

    def is_spike(self, index: int, norm: float) -> bool:
        """Whether `norm` of optimizer number `index` is a spike; notes it. False for the first `FIRST` norms."""
        if self.factor is None:
            return False
        norms = self.norms.setdefault(index, deque(maxlen=self.WINDOW))
        median = statistics.median(norms) if len(norms) >= self.FIRST else None
        norms.append(norm)
        return median is not None and median > 0 and norm > self.factor * median

    def median(self, index: int) -> float:
        return statistics.median(self.norms[index])

    def state_dict(self) -> dict[str, Any]:
        return {str(index): list(norms) for index, norms in self.norms.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.norms = {int(index): deque(norms, maxlen=self.WINDOW) for index, norms in state.items()}
