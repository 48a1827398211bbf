"""Attention whose entropy collapses while the loss or a gradient spikes, followed through a run."""

from __future__ import annotations

__all__ = ["EntropyCollapse"]

import math
from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import Any

from torch import Tensor

from pl_normkit.methods.depth_profile.profile import DepthProfile

LOW, FALL, WITHIN = 0.05, 0.5, 100
SPIKE, USUAL = 2.0, 5


class EntropyCollapse:
    """Says where attention has collapsed: entropy below 0.05, or fallen by half within 100 steps, together with a spike.

    A spike is a value that is not finite or above twice the median of the readings before it, of which five are needed. Entropy alone
    says nothing: sharp attention can be right, and the authors of arXiv 2303.06296 report no more than that sharp falls and instability
    come together (README of apple/ml-sigma-reparam). The cuts are derived here, and no run of ours has collapsed.

    >>> watch = EntropyCollapse()
    >>> for step in range(0, 50, 10):
    ...     watch.add_value("loss", 2.0, step)
    >>> watch.add_entropies({"blocks.3": 0.6}, 50)
    []
    >>> watch.add_value("loss", 9.0, 60)
    >>> watch.add_entropies({"blocks.3": 0.2}, 60)
    ['blocks.3']
    """

    def __init__(self) -> None:
        self._values: dict[str, deque[float]] = {}
        self._spiked_at: int | None = None
        self._entropies: dict[str, deque[tuple[int, float]]] = {}

    def add_value(self, name: str, value: float, step: int) -> None:
        """Take a reading of a loss or of the norm of gradients."""
        before = self._values.setdefault(name, deque(maxlen=20))
        if not math.isfinite(value) or (len(before) >= USUAL and value > SPIKE * median(before)):
            self._spiked_at = step
        if math.isfinite(value):
            before.append(value)

    def add_output(self, output: Any, step: int) -> None:
        """Take the loss of a training step: a tensor, or one under "loss"."""
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if isinstance(loss, Tensor) and loss.numel() == 1:
            self.add_value("loss", float(loss.detach()), step)

    def judge(self, profile: DepthProfile, step: int) -> str:
        """What is wrong with the entropies of a profile, "" where nothing is."""
        entropies = {row.module: row.entropy for row in profile.additions if row.entropy is not None}
        collapsed = self.add_entropies(entropies, step)
        if not collapsed:
            return ""
        return (
            f"Attention in {', '.join(collapsed[:3])} has collapsed (entropy {entropies[collapsed[0]]:.2g} of the largest) while the loss "
            f"spiked (step {step}). Lower the learning rate, or normalize queries and keys"
        )

    def add_entropies(self, entropies: Mapping[str, float], step: int) -> list[str]:
        """Take the normalized entropies of attentions, and say which have collapsed while something spiked within the last 100 steps."""
        collapsed = []
        for name, entropy in entropies.items():
            seen = self._entropies.setdefault(name, deque())
            while seen and step - seen[0][0] > WITHIN:
                seen.popleft()
            highest = max((value for _, value in seen), default=entropy)
            seen.append((step, entropy))
            if entropy < LOW or entropy < (1 - FALL) * highest:
                collapsed.append(name)
        is_spiking = self._spiked_at is not None and step - self._spiked_at <= WITHIN
        return collapsed if is_spiking else []
