"""Decoders as people write them, small."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pl_normkit.methods.fusion_scale.modules import ScaleEqualizer
from pl_normkit.methods.fusion_scale.moments import Moments
from pl_normkit.methods.fusion_scale.running import measuring


class Levels(nn.Module):
    """Two levels on very different scales: 8 channels at full, 6 at half resolution."""

    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Conv2d(3, 8, 3, padding=1)
        self.coarse = nn.Conv2d(3, 6, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return 5 * self.fine(x).relu(), 0.3 * self.coarse(x).relu() + 0.1


class OwnDecoder(nn.Module):
    """A user's own: functional resize and concatenation, a convolution, a norm, a classifier.

    Args:
        kernel: of the fusion convolution, padded with zeros to keep the size.
        bias: of the fusion convolution.
        norm: after it.
        between: what the joined features pass before the convolution.
    """

    def __init__(self, kernel: int = 1, bias: bool = True, norm: bool = True, between: nn.Module | None = None) -> None:
        super().__init__()
        self.levels = Levels()
        self.between = between if between is not None else nn.Identity()
        self.fuse = nn.Conv2d(14, 5, kernel, padding=kernel // 2, bias=bias)
        self.norm: nn.Module = nn.BatchNorm2d(5) if norm else nn.Identity()
        self.head = nn.Conv2d(5, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine, coarse = self.levels(x)
        up = F.interpolate(coarse, fine.shape[2:], mode="bilinear")
        out: Tensor = self.head(self.norm(self.fuse(self.between(torch.cat([fine, up], 1)))).relu())
        return out


class Nested(nn.Module):
    """Three levels, fused one after the other: the second fusion reads what the first made."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.down1 = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.down2 = nn.Conv2d(6, 8, 3, stride=2, padding=1)
        self.fuse1 = nn.Sequential(nn.Conv2d(14, 7, 1, bias=False), nn.BatchNorm2d(7), nn.ReLU())
        self.fuse2 = nn.Conv2d(11, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        full = 3 * self.stem(x).relu()
        half = self.down1(full).relu()
        quarter = self.down2(half).relu()
        half = self.fuse1(torch.cat([F.interpolate(quarter, half.shape[2:]), half], 1))
        out: Tensor = self.fuse2(torch.cat([F.interpolate(half, full.shape[2:], mode="bilinear"), full], 1))
        return out


class SharedFusion(nn.Module):
    """One fusion convolution that runs on two pairs of levels."""

    def __init__(self) -> None:
        super().__init__()
        self.levels = Levels()
        self.fuse = nn.Conv2d(14, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for image in (x, 2 * x):
            fine, coarse = self.levels(image)
            outputs.append(self.fuse(torch.cat([fine, F.interpolate(coarse, fine.shape[2:])], 1)))
        return torch.stack(outputs, 2).amax(2)


class SumDecoder(nn.Module):
    """Levels that are added: every operand ends in a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.levels = Levels()
        self.up = nn.Upsample(scale_factor=2, mode="bilinear")
        self.lateral = nn.Sequential(nn.Conv2d(8, 6, 1), nn.ReLU())
        self.head = nn.Conv2d(6, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        fine, coarse = self.levels(x)
        out: Tensor = self.head(self.lateral(fine) + self.up(coarse))
        return out


def images(batches: int = 2, size: int = 16, samples: int = 4, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(samples, 3, size, size, generator=generator) for _ in range(batches)]


def scales_after(model: nn.Module, loader: list[Any]) -> dict[str, tuple[list[float], list[float]]]:
    """Mean and standard deviation per branch of what every equalizer hands on, over all batches, taken from its output alone."""
    found: dict[str, Moments] = {}
    widths = {path: module.widths for path, module in model.named_modules() if isinstance(module, ScaleEqualizer)}

    def add(path: str, output: Tensor) -> None:
        found[path] = found.get(path, Moments.empty(sum(widths[path]))).merge(Moments.of(output))

    handles = [model.get_submodule(path).register_forward_hook(lambda _, __, output, path=path: add(path, output)) for path in widths]
    with measuring(model):
        for batch in loader:
            model(**batch) if isinstance(batch, dict) else model(batch)
    for handle in handles:
        handle.remove()
    pooled = {path: moments.pooled(widths[path]) for path, moments in found.items()}
    return {path: (moments.mean.tolist(), moments.std.tolist()) for path, moments in pooled.items()}
