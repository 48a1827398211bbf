"""The Frechet distance between two sets of feature vectors."""

from __future__ import annotations

__all__ = ["FrechetDistance", "frechet_distance"]

import math

import torch
from torch import Tensor
from torchmetrics import Metric


def frechet_distance(mean: Tensor, covariance: Tensor, other_mean: Tensor, other_covariance: Tensor) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1^1/2 S2 S1^1/2)^1/2): of two normal distributions; NaN where a value is not finite.

    Source: D. Dowson and B. Landau, "The Frechet Distance between Multivariate Normal Distributions" (1982).

    >>> one = torch.eye(2, dtype=torch.float64)
    >>> round(frechet_distance(torch.zeros(2), one, torch.tensor([3.0, 4.0]), 4 * one), 6)
    27.0
    """
    if not all(bool(value.isfinite().all()) for value in (mean, covariance, other_mean, other_covariance)):
        return math.nan
    values, vectors = torch.linalg.eigh(covariance.double())
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    between = torch.linalg.eigvalsh(root @ other_covariance.double() @ root).clamp(min=0).sqrt().sum()
    apart = (mean.double() - other_mean.double()).square().sum()
    return float(apart + covariance.double().trace() + other_covariance.double().trace() - 2 * between)


class FrechetDistance(Metric):
    """Between features of real and of generated images, over all batches and processes: sums of moments in float64.

    Args:
        features: length of a feature vector.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    def __init__(self, features: int) -> None:
        super().__init__()
        for side in ("real", "made"):
            self.add_state(f"{side}_count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
            self.add_state(f"{side}_sum", torch.zeros(features, dtype=torch.float64), dist_reduce_fx="sum")
            self.add_state(f"{side}_squares", torch.zeros(features, features, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, real: Tensor, made: Tensor) -> None:
        """Add feature vectors (N, features) of real and of generated images."""
        for side, found in (("real", real.double()), ("made", made.double())):
            setattr(self, f"{side}_count", getattr(self, f"{side}_count") + len(found))
            setattr(self, f"{side}_sum", getattr(self, f"{side}_sum") + found.sum(0))
            setattr(self, f"{side}_squares", getattr(self, f"{side}_squares") + found.T @ found)

    def compute(self) -> Tensor:
        """The distance; NaN below two vectors a side."""
        return torch.tensor(frechet_distance(*self._moments("real"), *self._moments("made")))

    def _moments(self, side: str) -> tuple[Tensor, Tensor]:
        count, total = getattr(self, f"{side}_count"), getattr(self, f"{side}_sum")
        mean = total / count
        return mean, (getattr(self, f"{side}_squares") - count * torch.outer(mean, mean)) / (count - 1)
