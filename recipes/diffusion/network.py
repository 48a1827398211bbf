"""A small U-Net whose norm, and the way the time comes in around it, are options."""

from __future__ import annotations

__all__ = ["Injection", "NormName", "UNet"]

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pl_normkit.methods.group_count import num_groups
from pl_normkit.nn import FiLMNorm, PositionalTimeEmbedding, TimeAfterNorm

NormName = Literal["group", "batch", "instance", "layer"]
Injection = Literal["add", "positional", "after_norm", "film"]


class UNet(nn.Module):
    """Predicts the noise in images: residual blocks on two scales, a time in each.

    Args:
        in_chans: channels of the images.
        channels: width at full resolution; twice as many at half of it.
        norm: "group", "batch", "instance", or "layer" (a group norm of one group).
        groups: of the group norms, rounded to a divisor of their channels.
        injection: how the time enters the second norm of a block: "add" before it (one number a channel, as in DDPM), "positional"
            before it (varying over positions), "after_norm" (added behind it), "film" (scale and shift behind it).

    Shapes: images (N, in_chans, H, W) and times (N,) -> (N, in_chans, H, W).

    Source: J. Ho et al., "Denoising Diffusion Probabilistic Models", arXiv 2006.11239, made small.

    >>> UNet(channels=8)(torch.randn(2, 1, 8, 8), torch.tensor([0, 9])).shape
    torch.Size([2, 1, 8, 8])
    """

    def __init__(
        self, in_chans: int = 1, channels: int = 32, norm: NormName = "group", groups: int = 8, injection: Injection = "add"
    ) -> None:
        super().__init__()
        self.channels = channels
        features = 4 * channels
        self.embedding = nn.Sequential(nn.Linear(channels, features), nn.SiLU(), nn.Linear(features, features), nn.SiLU())

        def block(inputs: int, outputs: int) -> _Block:
            return _Block(inputs, outputs, features, norm, groups, injection)

        self.first = nn.Conv2d(in_chans, channels, 3, padding=1)
        self.down = block(channels, channels)
        self.halve = nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1)
        self.middle = nn.ModuleList([block(2 * channels, 2 * channels), block(2 * channels, 2 * channels)])
        self.up = block(3 * channels, channels)
        self.last = nn.Sequential(_norm(norm, channels, groups), nn.SiLU(), nn.Conv2d(channels, in_chans, 3, padding=1))
        nn.init.zeros_(self.last[-1].weight)  # type: ignore[arg-type]

    def forward(self, images: Tensor, times: Tensor) -> Tensor:
        embedding = self.embedding(_waves(times, self.channels).to(images.dtype))
        wide = self.down(self.first(images), embedding)
        h = self.halve(wide)
        for block in self.middle:
            h = block(h, embedding)
        h = torch.cat([F.interpolate(h, size=wide.shape[2:]), wide], dim=1)
        noise: Tensor = self.last(self.up(h, embedding))
        return noise


class _Block(nn.Module):
    """Norm, SiLU, convolution, twice, beside a shortcut; the time enters around the second norm."""

    def __init__(self, inputs: int, outputs: int, features: int, norm: NormName, groups: int, injection: Injection) -> None:
        super().__init__()
        self.injection = injection
        self.norm1, self.conv1 = _norm(norm, inputs, groups), nn.Conv2d(inputs, outputs, 3, padding=1)
        norm2 = _norm(norm, outputs, groups)
        behind = {"after_norm": TimeAfterNorm, "film": FiLMNorm}
        if injection in behind:
            self.norm2: nn.Module = behind[injection](norm2, features, outputs)
        else:
            self.norm2 = norm2
            self.time = PositionalTimeEmbedding(features, outputs) if injection == "positional" else nn.Linear(features, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        if self.injection == "add":
            h = self.norm2(h + self.time(embedding)[:, :, None, None])
        elif self.injection == "positional":
            h = self.norm2(h + self.time(embedding, h))
        else:
            h = self.norm2(h, embedding)
        out: Tensor = self.conv2(F.silu(h)) + self.shortcut(x)
        return out


def _norm(name: NormName, channels: int, groups: int) -> nn.Module:
    if name == "batch":
        return nn.BatchNorm2d(channels)
    if name == "instance":
        return nn.InstanceNorm2d(channels, affine=True)
    return nn.GroupNorm(1 if name == "layer" else num_groups(channels, groups), channels)


def _waves(times: Tensor, features: int) -> Tensor:
    """Sines and cosines (N, features) of periods from 2 pi to 2 pi 10^4, in float32 whatever the network computes in."""
    half = features // 2
    rates = torch.exp(torch.arange(half, device=times.device, dtype=torch.float32) * (-math.log(10_000) / half))
    angles = times.float()[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)
