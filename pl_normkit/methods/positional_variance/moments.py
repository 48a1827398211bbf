"""Streaming sums: variance of patch tokens, and moments of the image that the patch projection reads."""

from __future__ import annotations

__all__ = ["Estimate", "ImageMoments", "MomentSums"]

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class ImageMoments:
    """Moments per channel of normalised images; 0 and 1 where the normalization fits the data.

    Attributes:
        mean: E[I] of each channel.
        second_moment: E[I^2] of each channel.
    """

    mean: tuple[float, ...]
    second_moment: tuple[float, ...]

    @property
    def std(self) -> tuple[float, ...]:
        """Standard deviation of each channel: what noise that replaces pixels should have."""
        return tuple(max(square - mean**2, 0.0) ** 0.5 for mean, square in zip(self.mean, self.second_moment, strict=True))

    @property
    def overall_mean(self) -> float:
        """Mean of E[I] over channels."""
        return sum(self.mean) / max(len(self.mean), 1)

    @property
    def overall_second_moment(self) -> float:
        """Mean of E[I^2] over channels."""
        return sum(self.second_moment) / max(len(self.second_moment), 1)


@dataclass
class MomentSums:
    """Sums over batches; the numbers of `totals` of two of them, as of two ranks, add up.

    Attributes:
        variances: (count, sum, sum of squares) of Var[X] per image.
        batches: the same of its mean per batch: images of one batch may share what was drawn for them.
        pixels: number of pixels seen.
        first: sum of the pixels per channel.
        second: sum of their squares per channel.
    """

    variances: Tensor = field(default_factory=lambda: torch.zeros(3, dtype=torch.float64))
    batches: Tensor = field(default_factory=lambda: torch.zeros(3, dtype=torch.float64))
    pixels: float = 0.0
    first: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    second: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))

    @torch.no_grad()
    def add_tokens(self, tokens: Tensor, channel_dim: int) -> None:
        """Take in a batch of tokens, (N, ...), whose channels are at `channel_dim`."""
        found = tokens.detach().float().var(channel_dim, correction=0).flatten(1).mean(1).double().cpu()
        mean = found.mean()
        self.variances += torch.stack([torch.tensor(float(len(found))), found.sum(), found.square().sum()])
        self.batches += torch.stack([torch.tensor(1.0), mean, mean.square()])

    @torch.no_grad()
    def add_images(self, images: Tensor) -> None:
        """Take in a batch of images, (N, C, H, W)."""
        channels = images.detach().float().transpose(0, 1).flatten(1)
        mean, square = channels.mean(1).double().cpu(), channels.square().mean(1).double().cpu()
        if self.first.numel() == 0:
            self.first, self.second = torch.zeros_like(mean), torch.zeros_like(mean)
        count = channels.shape[1]
        self.pixels += count
        self.first += mean * count
        self.second += square * count

    @property
    def images(self) -> ImageMoments:
        count = max(self.pixels, 1.0)
        return ImageMoments(tuple((self.first / count).tolist()), tuple((self.second / count).tolist()))

    @property
    def totals(self) -> Tensor:
        """What ranks add up, float64 (8,): variances, batches, pixels, sum of squares of a mean channel."""
        second = float(self.second.sum()) / max(self.second.numel(), 1)
        return torch.cat([self.variances, self.batches, torch.tensor([self.pixels, second], dtype=torch.float64)])


@dataclass(frozen=True)
class Estimate:
    """A mean with its standard error."""

    value: float
    error: float

    @classmethod
    def from_totals(cls, totals: Tensor) -> Estimate:
        """Var[X] from `MomentSums.totals`; the error is the larger of those over images and over batches."""
        images, batches = totals[:3].tolist(), totals[3:6].tolist()
        return cls(images[1] / max(images[0], 1.0), max(_standard_error(*images), _standard_error(*batches)))

    def over(self, other: Estimate) -> Estimate:
        """The ratio of two independent estimates."""
        if self.value == 0.0 or other.value == 0.0:
            return Estimate(math.nan, math.nan)
        relative = math.hypot(self.error / self.value, other.error / other.value)
        return Estimate(self.value / other.value, self.value / other.value * relative)

    def is_off(self, tolerance: float, expected: float = 1.0) -> bool:
        """Whether it is further from `expected` than `tolerance` allows, and than two standard errors."""
        deviation = abs(self.value / expected - 1.0)
        return deviation > tolerance and deviation > 2.0 * self.error / expected


def _standard_error(count: float, total: float, square: float) -> float:
    if count < 2.0:
        return 0.0
    return math.sqrt(max(square / count - (total / count) ** 2, 0.0) / (count - 1.0))
