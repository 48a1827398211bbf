"""Small networks that take a time in the ways real ones do."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

NormOf = Callable[[int], nn.Module]

NORMS: dict[str, NormOf] = {
    "batch": nn.BatchNorm2d,
    "instance": nn.InstanceNorm2d,
    "group of 2": lambda channels: nn.GroupNorm(channels // 2, channels),
    "group of 4": lambda channels: nn.GroupNorm(channels // 4, channels),
    "group of 16": lambda channels: nn.GroupNorm(channels // 16, channels),
    "one group": lambda channels: nn.GroupNorm(1, channels),
}


class ConcatConv(nn.Module):
    """As in torchdiffeq's example: the plane t comes first."""

    def __init__(self, channels: int, padding_mode: str = "circular") -> None:
        super().__init__()
        self._layer = nn.Conv2d(channels + 1, channels, 3, padding=1, padding_mode=padding_mode)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        planes = torch.ones_like(x[:, :1]) * t
        return self._layer(torch.cat([planes, x], 1))


class OdeFunction(nn.Module):
    """Norm, ReLU, ConcatConv, twice, and a norm."""

    def __init__(self, norm: NormOf, channels: int = 32, padding_mode: str = "circular") -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = norm(channels), norm(channels), norm(channels)
        self.conv1, self.conv2 = ConcatConv(channels, padding_mode), ConcatConv(channels, padding_mode)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        h = self.conv1(t, self.norm1(x).relu())
        h = self.conv2(t, self.norm2(h).relu())
        return self.norm3(h)

    @staticmethod
    def inputs(channels: int = 32) -> tuple[Tensor, Tensor]:
        return torch.tensor(0.3), torch.randn(4, channels, 8, 8)


class ResBlock(nn.Module):
    """As in DDPM: a time for each sample, projected and added before the second norm. Biases start at zero, as there."""

    def __init__(self, norm: NormOf, channels: int = 64, features: int = 16, dims: int = 2) -> None:
        super().__init__()
        conv = nn.Conv2d if dims == 2 else nn.Conv1d
        self.block1 = nn.Sequential(norm(3), nn.Tanh(), conv(3, channels, 3, padding=1, padding_mode="circular"))
        self.temb_proj = nn.Sequential(nn.SiLU(), nn.Linear(features, channels))
        self.block2 = nn.Sequential(norm(channels), nn.SiLU(), conv(channels, 3, 3, padding=1, padding_mode="circular"))
        for layer in (self.block1[2], self.temb_proj[1]):
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        h = self.block1(x)
        offset = self.temb_proj(temb)
        return x + self.block2(h + offset.reshape(*offset.shape, *[1] * (x.dim() - 2)))

    @staticmethod
    def inputs() -> tuple[Tensor, Tensor]:
        """A time that is small beside the features, where the share is near 1 - G / C."""
        return torch.randn(4, 3, 8, 8), 0.3 * torch.randn(4, 16)


def res_block(norm: str, **options: int) -> ResBlock:
    """The first norm has three channels, which only instance, batch and one-group norms divide."""
    return ResBlock(lambda channels: nn.GroupNorm(1, 3) if channels == 3 else NORMS[norm](channels), **options)


class AdaptiveBlock(nn.Module):
    """As in guided diffusion: scale and shift behind the norm."""

    def __init__(self, groups: int = 16, channels: int = 32) -> None:
        super().__init__()
        self.conv, self.norm, self.time = nn.Conv2d(3, channels, 3), nn.GroupNorm(groups, channels), nn.Linear(16, 2 * channels)
        self.out = nn.Conv2d(channels, 3, 3)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        scale, shift = self.time(temb)[:, :, None, None].chunk(2, 1)
        return self.out((self.norm(self.conv(x)) * (1 + scale) + shift).relu())


class ContextBlock(nn.Module):
    """A gate and a context made of the features themselves: no time."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.context, self.norm = nn.Conv2d(3, 32, 3), nn.Linear(32, 32), nn.InstanceNorm2d(32)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        pooled = self.context(h.mean((2, 3)))[:, :, None, None]
        return self.norm(h * pooled.sigmoid() + pooled)


class VectorField(nn.Module):
    """A neural ODE on vectors: the time is a column, and batch norm sees one time."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm = nn.Linear(3, 16), nn.BatchNorm1d(16)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.norm(self.inner(torch.cat([t.expand(len(x), 1), x], 1)))
