"""Numbers of a hidden state, token by token."""

from __future__ import annotations

__all__ = ["Summary", "Tokens", "angle_between", "entropies_in", "massive_in", "summarize"]

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pl_normkit.methods.depth_profile.profile import Massive

MASSIVE, OVER_MEDIAN, LISTED = 100.0, 1000.0, 8


@dataclass(frozen=True)
class Tokens:
    """A hidden state by tokens, padding left out.

    Attributes:
        values: (tokens, channels), float32 or wider.
        grid: sizes of the positions of one sample: (T,), (H, W), () where a sample is one vector.
        index: of each token among the samples' positions, flattened.
        is_first: whether it is the first of its sequence; None where positions are no sequence.
    """

    values: Tensor
    grid: tuple[int, ...]
    index: Tensor
    is_first: Tensor | None

    @classmethod
    def of(cls, value: Tensor, channel_axis: int, mask: Tensor | None) -> Tokens:
        """Read a hidden state whose samples are on axis 0; `mask` (N, T) counts where the state is a sequence of that shape."""
        moved = value.detach().movedim(channel_axis, -1)
        grid = tuple(moved.shape[1:-1])
        flat = moved.reshape(-1, moved.shape[-1])
        flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
        index = torch.arange(flat.shape[0], device=flat.device)
        if len(grid) != 1:
            return cls(flat, grid, index, None)
        is_masked = mask is not None and mask.shape == moved.shape[:2]
        kept = mask.to(flat.device).bool() if mask is not None and is_masked else torch.ones(moved.shape[:2], device=flat.device).bool()
        first = (kept & (kept.cumsum(1) == 1)).flatten()
        kept = kept.flatten()
        return cls(flat[kept], grid, index[kept], first[kept])

    def variance(self) -> float:
        """Over the channels of a token, mean over tokens."""
        return float(self.values.var(-1, correction=0).mean())

    def directions(self) -> Tokens:
        """The same tokens at length 1: a copy, which later in-place operations do not reach."""
        return Tokens(F.normalize(self.values, dim=-1), self.grid, self.index, self.is_first)


@dataclass(frozen=True)
class Summary:
    """Numbers of one stream, as `AdditionProfile` explains them."""

    variance: float
    mean_square: float
    largest: float
    largest_elsewhere: float | None
    median: float


def summarize(stream: Tokens) -> Summary:
    """The numbers of a stream."""
    magnitudes = stream.values.abs()
    elsewhere = None
    if stream.is_first is not None and bool((~stream.is_first).any()):
        elsewhere = float(magnitudes[~stream.is_first].max())
    mean_square = float(stream.values.square().mean())
    return Summary(stream.variance(), mean_square, float(magnitudes.max()), elsewhere, float(magnitudes.median()))


def angle_between(before: Tokens, after: Tokens) -> float | None:
    """Angle between equal tokens over pi, mean over tokens; None where they are not the same tokens of the same width."""
    if before.values.shape != after.values.shape or before.grid != after.grid:
        return None
    cosine = (before.values * F.normalize(after.values, dim=-1)).sum(-1).clamp(-1.0, 1.0)
    return float(torch.arccos(cosine).mean()) / math.pi


def entropies_in(calls: Sequence[Tensor], mask: Tensor | None) -> tuple[float, float] | None:
    """Mean over queries and heads, and that of the lowest head, of (N, heads, queries) entropies; queries of padding and NaN are left out.

    None where nothing is left.
    """
    heads = []
    for entropy in calls:
        if mask is not None and mask.shape == (entropy.shape[0], entropy.shape[2]):
            entropy = entropy.masked_fill(~mask.to(entropy.device).bool()[:, None], math.nan)
        heads.append(entropy.nanmean((0, 2)))
    every = torch.cat(heads) if heads else torch.empty(0)
    every = every[~every.isnan()]
    return (float(every.mean()), float(every.min())) if every.numel() else None


def massive_in(stream: Tokens, median: float) -> tuple[Massive, ...]:
    """Magnitudes above 100 and at least 1000 times the median, the largest first, each position and channel once.

    None where the state has overflowed.
    """
    magnitudes = stream.values.abs()
    if not MASSIVE < float(magnitudes.max()) < math.inf:
        return ()
    found: dict[tuple[int, int], float] = {}
    positions = math.prod(stream.grid)
    for row, channel in ((magnitudes > MASSIVE) & (magnitudes >= OVER_MEDIAN * median)).nonzero().tolist():
        key, value = (int(stream.index[row]) % positions, channel), float(magnitudes[row, channel])
        found[key] = max(value, found.get(key, 0.0))
    largest = sorted(found.items(), key=lambda item: -item[1])[:LISTED]
    return tuple(Massive(_unravel(position, stream.grid), channel, value) for (position, channel), value in largest)


def _unravel(position: int, grid: tuple[int, ...]) -> tuple[int, ...]:
    found = []
    for size in reversed(grid):
        found.append(position % size)
        position //= size
    return tuple(reversed(found))
