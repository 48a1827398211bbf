"""Every arm of a comparison against every other, in one family of tests."""

from __future__ import annotations

__all__ = ["ALPHA", "Contrast", "contrast_arms"]

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from pl_normkit.recipes.arms import WITHOUT
from pl_normkit.recipes.paired_difference import PairedDifference, holm, paired_difference, smallest_shown
from pl_normkit.recipes.paired_runs import PairedRun

ALPHA = 0.05


@dataclass(frozen=True)
class Contrast:
    """One arm against another in one metric.

    Attributes:
        metric: name of the metric.
        arm, against: names of the arms; differences are `arm - against`.
        seeds: those that both arms have been trained with.
        difference: its mean and interval.
        values: the difference of each seed.
        same: whether all pairs ended with the same weights and metrics, bit for bit: there is nothing to test.
        family: how many tests decide together: those of the primary metric. 0 where this one decides nothing.
        p: by Holm over the family. None where nothing is tested.
        smallest: the smallest true difference that such runs show in four of five comparisons, at the level of Holm's first step.
    """

    metric: str
    arm: str
    against: str
    seeds: tuple[int, ...]
    difference: PairedDifference
    values: tuple[float, ...]
    same: bool
    family: int = 0
    p: float | None = None
    smallest: float | None = None

    @property
    def shown(self) -> bool:
        """Whether these runs show a difference."""
        return self.p is not None and self.p < ALPHA


def contrast_arms(
    runs: Mapping[tuple[int, str], PairedRun], arms: Sequence[str], seeds: Sequence[int], metrics: Sequence[str]
) -> list[Contrast]:
    """All pairs of arms, by metric; those of the first metric, which was named beforehand, are tested together."""
    pairs = [(later, earlier) for earlier, later in combinations(arms, 2)]
    # Against none first: that is what most readers look for.
    pairs.sort(key=lambda pair: pair[1] != WITHOUT)
    first, *others = ([_contrast(runs, arm, against, seeds, metric) for arm, against in pairs] for metric in metrics)
    tested = [contrast for contrast in first if contrast.difference.p is not None and not contrast.same]
    adjusted = iter(holm([contrast.difference.p for contrast in tested if contrast.difference.p is not None]))
    decided = [_decide(contrast, len(tested), next(adjusted)) if contrast in tested else contrast for contrast in first]
    return [*decided, *(contrast for found in others for contrast in found)]


def _decide(contrast: Contrast, family: int, p: float) -> Contrast:
    spread = contrast.difference.spread
    smallest = smallest_shown(spread, contrast.difference.count, ALPHA / family) if spread else None
    return replace(contrast, family=family, p=p, smallest=smallest)


def _contrast(runs: Mapping[tuple[int, str], PairedRun], arm: str, against: str, seeds: Sequence[int], metric: str) -> Contrast:
    shared = tuple(seed for seed in seeds if (seed, arm) in runs and (seed, against) in runs)
    late, early = ([runs[seed, name] for seed in shared] for name in (arm, against))
    before, after = [run.metrics[metric] for run in early], [run.metrics[metric] for run in late]
    same = bool(shared) and all(one.ends_as(other) for one, other in zip(late, early, strict=True))
    values = tuple(last - first for first, last in zip(before, after, strict=True))
    return Contrast(metric, arm, against, shared, paired_difference(before, after), values, same)
