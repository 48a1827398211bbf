"""Ways to bring a time into normalized features that no norm takes away: varying over positions, or behind the norm."""

from __future__ import annotations

__all__ = [
    "AddAtPositions",
    "FiLMNorm",
    "PositionalPlane",
    "PositionalTimeEmbedding",
    "SecondProjection",
    "TimeAfterNorm",
    "TimeSlot",
    "position_pattern",
]

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pl_normkit.errors import EditError


def position_pattern(size: Sequence[int], like: Tensor) -> Tensor:
    """A fixed pattern pi over positions with mean 0 and variance 1, of shape `size`: cosines of half a period along each axis, summed.

    Pi is 0 where there is only one position, since nothing can vary there.

    >>> position_pattern((4, 4), torch.zeros(())).square().mean().item()
    1.0
    """
    axes = [axis for axis, length in enumerate(size) if length > 1]
    pattern = torch.zeros(tuple(size), device=like.device, dtype=torch.float32)
    for axis in axes:
        steps = torch.arange(size[axis], device=like.device, dtype=torch.float32)
        wave = torch.cos((steps + 0.5) * (math.pi / size[axis])) * math.sqrt(2 / len(axes))
        pattern = pattern + wave.view([-1 if other == axis else 1 for other in range(len(size))])
    return pattern.to(like.dtype)


def _over_space(offset: Tensor, dimensions: int) -> Tensor:
    """(N, C) -> (N, C, 1, ...) with `dimensions` dimensions."""
    return offset.reshape(*offset.shape, *[1] * (dimensions - offset.dim()))


class PositionalTimeEmbedding(nn.Module):
    """An offset that varies over positions: e1 + e2 pi, with e1 and e2 from one linear layer.

    Add it before a norm in place of a linear layer's output: the norm can take e1 away, not e2 pi.

    Args:
        features: size of the time embedding.
        channels: channels of the features it is added to.

    Shapes: embedding (N, features) and features (N, channels, *space) -> (N, channels, *space).

    Source: the idea of a positional timestep embedding is published with arXiv 2405.14126; this form is derived here.

    >>> embed = PositionalTimeEmbedding(16, 8)
    >>> embed(torch.randn(2, 16), torch.randn(2, 8, 5, 5)).shape
    torch.Size([2, 8, 5, 5])
    """

    def __init__(self, features: int, channels: int) -> None:
        super().__init__()
        self.projection = nn.Linear(features, 2 * channels)

    def forward(self, embedding: Tensor, features: Tensor) -> Tensor:
        constant, varying = self.projection(embedding).chunk(2, dim=-1)
        pattern = position_pattern(features.shape[2:], constant)
        return _over_space(constant, features.dim()) + _over_space(varying, features.dim()) * pattern


class TimeAfterNorm(nn.Module):
    """norm(x) + e: the time comes behind the norm, which then takes nothing of it.

    Args:
        norm: normalizes (N, channels, *space).
        features: size of the time embedding.
        channels: channels of the norm.

    Source: derived here.

    >>> TimeAfterNorm(nn.InstanceNorm2d(8), 16, 8)(torch.randn(2, 8, 5, 5), torch.randn(2, 16)).shape
    torch.Size([2, 8, 5, 5])
    """

    def __init__(self, norm: nn.Module, features: int, channels: int) -> None:
        super().__init__()
        self.norm = norm
        self.projection = nn.Linear(features, channels)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        normalized: Tensor = self.norm(x)
        return normalized + _over_space(self.projection(embedding), x.dim())


class FiLMNorm(nn.Module):
    """norm(x) (1 + s) + b with s and b from the time embedding, as in AdaGN.

    Args:
        norm: normalizes (N, channels, *space).
        features: size of the time embedding.
        channels: channels of the norm.

    Source: Perez et al., "FiLM: Visual Reasoning with a General Conditioning Layer", arXiv 1709.07871.

    >>> FiLMNorm(nn.GroupNorm(4, 8), 16, 8)(torch.randn(2, 8, 5, 5), torch.randn(2, 16)).shape
    torch.Size([2, 8, 5, 5])
    """

    def __init__(self, norm: nn.Module, features: int, channels: int) -> None:
        super().__init__()
        self.norm = norm
        self.projection = nn.Linear(features, 2 * channels)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = (_over_space(part, x.dim()) for part in self.projection(embedding).chunk(2, dim=-1))
        normalized: Tensor = self.norm(x)
        return normalized * (1 + scale) + shift


class PositionalPlane(nn.Module):
    """Multiplies the channels `first` up to `last` by pi: the constant planes t of a concatenation become t pi.

    >>> PositionalPlane(0, 1)(torch.ones(1, 3, 4, 4))[0, :, 0, 0]
    tensor([1.8478, 1.0000, 1.0000])
    """

    def __init__(self, first: int, last: int) -> None:
        super().__init__()
        self.first = first
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        planes = x[:, self.first : self.last] * position_pattern(x.shape[2:], x)
        return torch.cat([x[:, : self.first], planes, x[:, self.last :]], dim=1)


class TimeSlot(nn.Module):
    """Holds e2 from the time layer's forward until the forward of the norms: all have this module as a part, so copies share their own.

    Attributes:
        readers: norms that take the value.
    """

    def __init__(self) -> None:
        super().__init__()
        self.readers = 0
        self.value: Tensor | None = None
        self.left = 0

    def put(self, value: Tensor) -> None:
        self.value, self.left = value, self.readers

    def take(self) -> Tensor:
        """The value, which is gone with its last reader: a tensor of a graph must not stay in a module that may be copied."""
        value = self.value
        if value is None:
            raise EditError("the norm of a positional time embedding ran, and its time layer did not run before it")
        self.left -= 1
        if self.left == 0:
            self.value = None
        return value


class SecondProjection(nn.Module):
    """e2 beside a time layer's own output e1."""

    def __init__(self, layer: nn.Linear, slot: TimeSlot) -> None:
        super().__init__()
        self.projection = nn.Linear(layer.in_features, layer.out_features, device=layer.weight.device, dtype=layer.weight.dtype)
        self.slot = slot

    def forward(self, embedding: Tensor) -> None:
        self.slot.put(self.projection(embedding))


class AddAtPositions(nn.Module):
    """x + e2 pi, before a norm."""

    def __init__(self, slot: TimeSlot) -> None:
        super().__init__()
        self.slot = slot

    def forward(self, x: Tensor) -> Tensor:
        varying = self.slot.take()
        varying = varying.reshape(-1, varying.shape[-1])
        return x + _over_space(varying, x.dim()) * position_pattern(x.shape[2:], varying)
