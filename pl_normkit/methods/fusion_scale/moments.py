"""Streaming mean and variance per channel: merged, never by the difference of E[x^2] and E[x]^2, and the same on every rank."""

from __future__ import annotations

__all__ = ["Moments", "agree_on_problem", "merge_over_ranks"]

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from pl_normkit.errors import DataError

_RUN = 4096
"""Squares summed in float32 at a time; over a map of a million the sum would lose three digits."""


@dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squared deviations of each of C channels, all float64 of shape (C,), on the CPU.

    Source: Chan, Golub and LeVeque's pairwise update.
    """

    count: Tensor
    mean: Tensor
    m2: Tensor

    @classmethod
    def empty(cls, channels: int) -> Moments:
        return cls(*(torch.zeros(channels, dtype=torch.float64) for _ in range(3)))

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """Of (N, C, ...) features, per channel over everything else; half types are widened first.

        Two passes over each sample's map, centred before squaring; samples are merged in float64. The norm of the centred map is
        several times faster on a CPU than torch's own variance.
        """
        features = features.detach()
        maps = (features if features.dtype == torch.float64 else features.float()).flatten(2)
        mean = maps.mean(2)
        norms = [_norms_around(*sample) for sample in zip(maps, mean, strict=True)]  # one sample's centred copy at a time
        means, *parts = torch.stack([mean, *torch.stack(norms, 1)]).cpu().double()
        count = torch.full_like(means, maps.shape[2])
        centre = means.mean(0)
        m2 = (torch.stack(parts).square().sum(0) + count * (means - centre).square()).sum(0)
        return cls(count.sum(0), centre, m2)

    @property
    def is_finite(self) -> bool:
        return bool(torch.isfinite(self.mean).all() and torch.isfinite(self.m2).all())

    @property
    def std(self) -> Tensor:
        """Biased standard deviation per channel, 0 where nothing was counted."""
        return (self.m2 / self.count.clamp(min=1)).sqrt()

    def merge(self, other: Moments) -> Moments:
        count = self.count + other.count
        share = other.count / count.clamp(min=1)
        delta = other.mean - self.mean
        return Moments(count, self.mean + delta * share, self.m2 + other.m2 + delta.square() * self.count * share)

    def pooled(self, widths: Sequence[int]) -> Moments:
        """The channels of each branch merged into one entry: shape (len(widths),)."""
        return _concatenate(_merge_channels(self._channels(first, last)) for first, last in _spans(widths))

    def _channels(self, first: int, last: int) -> Moments:
        return Moments(self.count[first:last], self.mean[first:last], self.m2[first:last])


def _norms_around(sample: Tensor, mean: Tensor) -> Tensor:
    """Norms of the parts of each channel's centred map: (C, L) and (C,) to (parts, C)."""
    centred = sample - mean[:, None]
    return torch.stack([torch.linalg.vector_norm(part, dim=1) for part in torch.split(centred, _RUN, 1)])


def _spans(widths: Sequence[int]) -> list[tuple[int, int]]:
    ends = [sum(widths[: position + 1]) for position in range(len(widths))]
    return list(zip([0, *ends[:-1]], ends, strict=True))


def _concatenate(parts: Iterable[Moments]) -> Moments:
    listed = list(parts)
    return Moments(*(torch.cat([getattr(part, name) for part in listed]) for name in ("count", "mean", "m2")))


def _merge_channels(moments: Moments) -> Moments:
    count = moments.count.sum()
    mean = (moments.mean * moments.count).sum() / count.clamp(min=1)
    m2 = moments.m2.sum() + (moments.count * (moments.mean - mean).square()).sum()
    return Moments(count[None], mean[None], m2[None])


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def merge_over_ranks(moments: Moments) -> Moments:
    """The moments of all ranks together, merged in rank order, so bit for bit the same on each; unchanged without processes."""
    if not _is_distributed():
        return moments
    mine = torch.stack([moments.count, moments.mean, moments.m2]).to(_device())
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    merged = Moments.empty(len(moments.count))
    for part in everyone:
        merged = merged.merge(Moments(*part.cpu()))
    return merged


def agree_on_problem(problem: DataError | None) -> None:
    """Raise `problem` on every rank where any rank has one, so that none waits for the others. Raises DataError."""
    flag = torch.tensor([float(problem is not None)])
    if _is_distributed():
        flag = flag.to(_device())
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    if problem is not None:
        raise problem
    if flag.item() > 0:
        raise DataError("another rank met data it cannot use while scales were measured", mend="see the message of that rank")
