"""Streaming mean and variance per channel: merged, never by the difference of E[x^2] and E[x]^2, and the same on every rank."""

from __future__ import annotations

__all__ = ["Moments", "agree_on_problem", "merge_over_ranks"]

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from pl_normkit.errors import DataError

_CHUNK = 1 << 18
"""Values centred at a time: 1 MiB of float32."""


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

        Two passes, centred before squaring; maps are merged in float64. It goes by a few channels of a sample at a time, which stay in the
        cache, and keeps their memory format: several times faster on a CPU than torch's own variance.
        """
        features = features.detach()
        maps = (features if features.dtype == torch.float64 else features.float()).flatten(2)
        rows = max(1, _CHUNK // max(1, maps.shape[2]))
        scratch = maps.new_empty(min(rows, maps.shape[1]) * maps.shape[2])
        parts = [_mean_and_m2(some, scratch) for sample in maps for some in sample.split(rows)]
        means, m2s = torch.cat(parts, 1).view(2, *maps.shape[:2]).cpu().double()
        count = torch.full_like(means, maps.shape[2])
        centre = means.mean(0)
        m2 = (m2s + count * (means - centre).square()).sum(0)
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


def _mean_and_m2(maps: Tensor, scratch: Tensor) -> Tensor:
    """Mean and sum of squared deviations of each channel's map: (C, L) to (2, C)."""
    mean = maps.mean(1)
    room = scratch[: maps.numel()]
    is_channels_last = maps.stride(0) < maps.stride(1)
    room = room.view(maps.shape[::-1]).t() if is_channels_last else room.view(maps.shape)
    return torch.stack([mean, torch.sub(maps, mean[:, None], out=room).square_().sum(1)])


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
        raise DataError("another rank met data it cannot use while scales were measured", fix="see the message of that rank")
