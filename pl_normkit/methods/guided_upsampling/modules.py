"""The joint filter and the two networks that predict its taps."""

from __future__ import annotations

__all__ = ["DeformableKernelNetwork", "JointFilter"]

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pl_normkit.errors import ConfigError, DataError

_LUMA = (0.299, 0.587, 0.114)
_STRIDE = 4


class JointFilter(nn.Module):
    """The sampling core: every output pixel is a weighted sum of `kernel_size`^2 samples of the target around it.

    Tap q of pixel p reads the target at p + base_q + offset(p, q), bilinearly, zero outside the image. Base offsets are -1, 0, 1 in both
    directions, row by row; coordinates are pixel centres (`align_corners=False`), so zero offsets read the pixels themselves. Offsets
    are clamped so that no sample leaves the window of `filter_size` pixels.

    Args:
        kernel_size: side of the grid of taps, odd.
        filter_size: side of the window, odd and not smaller.
        residual: taps are shifted to sum to 0 and the target is added, so that a flat target stays flat; else they are scaled to sum to 1.

    Shapes: weights (N, K, H, W), offsets (N, K, 2, H, W) as (x, y) in pixels, target (N, C, H, W), with K = kernel_size^2.

    Raises:
        ConfigError: for sizes that are not odd or do not fit.

    Source: residual form and window: the public code of arXiv 1910.08373. Direct sampling equals its unfolded patches while samples
    stay inside the window (derived here, tested); its half-pixel shift is not reproduced.

    >>> core = JointFilter()
    >>> target = torch.full((1, 1, 8, 8), 3.0)
    >>> out = core(torch.rand(1, 9, 8, 8), torch.zeros(1, 9, 2, 8, 8), target)
    >>> torch.allclose(out[..., 1:-1, 1:-1], target[..., 1:-1, 1:-1])
    True
    """

    def __init__(self, kernel_size: int = 3, filter_size: int = 15, residual: bool = True) -> None:
        super().__init__()
        if not all(type(size) is int and size % 2 == 1 for size in (kernel_size, filter_size)) or not 0 < kernel_size <= filter_size:
            raise ConfigError("kernel_size and filter_size must be odd, the second not smaller", evidence=f"{kernel_size}, {filter_size}")
        self.kernel_size, self.filter_size, self.residual = kernel_size, filter_size, residual

    @property
    def reach(self) -> int:
        """How far an offset may move a tap, in pixels, before it leaves the window."""
        return self.filter_size // 2 - self.kernel_size // 2

    def taps(self, weights: Tensor) -> Tensor:
        """The weights as they are used: summing to 0 in the residual form, to 1 otherwise."""
        if self.residual:
            return weights - weights.mean(1, keepdim=True)
        return weights / weights.sum(1, keepdim=True).clamp_min(torch.finfo(weights.dtype).eps)

    def forward(self, weights: Tensor, offsets: Tensor, target: Tensor) -> Tensor:
        taps, offsets = self.taps(weights), offsets.clamp(-self.reach, self.reach)
        out = target if self.residual else torch.zeros_like(target)
        half = self.kernel_size // 2
        for index in range(self.kernel_size**2):
            y, x = divmod(index, self.kernel_size)
            sampled = _sample(target, offsets[:, index, 0] + (x - half), offsets[:, index, 1] + (y - half))
            out = out + taps[:, index, None] * sampled
        return out


def _sample(target: Tensor, dx: Tensor, dy: Tensor) -> Tensor:
    """The target at every pixel moved by (dx, dy) pixels; float32 coordinates, since half precision cannot address large maps."""
    height, width = target.shape[-2:]
    xs = torch.arange(width, device=target.device, dtype=torch.promote_types(dx.dtype, torch.float32)) + dx
    ys = torch.arange(height, device=target.device, dtype=xs.dtype)[:, None] + dy
    grid = torch.stack([(2 * xs + 1) / width - 1, (2 * ys + 1) / height - 1], -1)
    return F.grid_sample(target.to(grid.dtype), grid, align_corners=False).to(target.dtype)


class DeformableKernelNetwork(nn.Module):
    """Sharpens an upsampled map by its guide: taps and offsets per pixel are products of what two networks see in the two.

    Called with guidance (N, 3, H, W) in RGB and target (N, C, H, W) that is already upsampled to the guide's size; returns (N, C, H, W).
    Each channel of the target is filtered alone. Any H and W: the fast form pads to multiples of 4 by replication and crops.

    Args:
        fast: FDKN (space-to-depth by 4, one pass over a quarter of the size); else DKN, at full resolution through dilation, which equals
            16 shifted passes of strided convolutions.
        kernel_size: side of the grid of taps.
        filter_size: side of the window that taps stay in.
        residual: as for `JointFilter`.

    Raises:
        DataError: for guidance and target whose sizes differ, and guidance without three channels.

    Source: layers, activations and products: the public code of arXiv 1910.08373; 1,158,070 parameters, 693,856 for the fast form.
    Grey is taken from RGB here, in BGR order there.

    >>> network = DeformableKernelNetwork(fast=True)
    >>> tuple(network(torch.rand(1, 3, 18, 22), torch.rand(1, 1, 18, 22)).shape)
    (1, 1, 18, 22)
    """

    def __init__(self, fast: bool = False, kernel_size: int = 3, filter_size: int = 15, residual: bool = True) -> None:
        super().__init__()
        self.fast = fast
        self.filter = JointFilter(kernel_size, filter_size, residual)
        count = kernel_size**2
        self.guidance: nn.Module = _FastBranch(count) if fast else _FullBranch(3, count)
        self.target: nn.Module = _FastBranch(count) if fast else _FullBranch(1, count)

    def forward(self, guidance: Tensor, target: Tensor) -> Tensor:
        if guidance.dim() != 4 or target.dim() != 4 or guidance.shape[1] != 3 or guidance.shape[2:] != target.shape[2:]:
            raise DataError(
                "guidance is (N, 3, H, W) and target (N, C, H, W) of the same size",
                evidence=f"{tuple(guidance.shape)} and {tuple(target.shape)}",
                fix="upsample the target to the guide's size first (bicubic)",
            )
        weights, offsets = self.kernels(guidance, target)
        channels = target.flatten(0, 1)[:, None]
        filtered: Tensor = self.filter(weights, offsets, channels)
        return filtered.view_as(target)

    def kernels(self, guidance: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Weights (N * C, K, H, W) before they are shifted or scaled, and offsets (N * C, K, 2, H, W) before they are clamped."""
        channels = target.flatten(0, 1)[:, None]
        if self.fast:
            padding = [(-size) % _STRIDE for size in target.shape[2:]]
            pad = (0, padding[1], 0, padding[0])
            grey = (guidance * guidance.new_tensor(_LUMA)[:, None, None]).sum(1, keepdim=True)
            guidance, channels = (F.pad(image, pad, mode="replicate") for image in (grey, channels))
        weights, offsets = self.guidance(guidance)
        own_weights, own_offsets = self.target(channels)
        repeats = target.shape[1]
        weights = weights.repeat_interleave(repeats, 0) * own_weights
        offsets = offsets.repeat_interleave(repeats, 0) * own_offsets
        height, width = target.shape[2:]
        return weights[..., :height, :width], offsets.unflatten(1, (-1, 2))[..., :height, :width]


class _FullBranch(nn.Module):
    """Layers of DKN. The strides of the public form become dilations: every position is computed, none is left out."""

    def __init__(self, channels: int, count: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(channels, 32, 7), nn.BatchNorm2d(32), nn.ReLU()),
            *(nn.Conv2d(32, 32, 2), nn.ReLU()),
            *(nn.Conv2d(32, 64, 5, dilation=2), nn.BatchNorm2d(64), nn.ReLU()),
            *(nn.Conv2d(64, 64, 2, dilation=2), nn.ReLU()),
            *(nn.Conv2d(64, 128, 5, dilation=4), nn.BatchNorm2d(128), nn.ReLU()),
            *(nn.Conv2d(128, 128, 3, dilation=4), nn.ReLU()),
            *(nn.Conv2d(128, 128, 3, dilation=4), nn.ReLU()),
        )
        self.weights, self.offsets = nn.Conv2d(128, count, 1), nn.Conv2d(128, 2 * count, 1)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        features = self.features(F.pad(image, (25, 24, 25, 24)))  # a receptive field of 50 pixels, the pixel itself at 25
        return self.weights(features).sigmoid(), self.offsets(features)


class _FastBranch(nn.Module):
    """Layers of FDKN, on 16 channels that hold a 4 x 4 patch of the image each."""

    def __init__(self, count: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = _STRIDE**2
        for width, has_norm in ((32, True), (32, False), (64, True), (64, False), (128, True), (128, False)):
            layers += [nn.Conv2d(channels, width, 3, padding=1), *([nn.BatchNorm2d(width)] if has_norm else []), nn.ReLU()]
            channels = width
        self.features = nn.Sequential(*layers)
        self.weights = nn.Conv2d(128, count * _STRIDE**2, 1)
        self.offsets = nn.Conv2d(128, 2 * count * _STRIDE**2, 1)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        features = self.features(F.pixel_unshuffle(image, _STRIDE))
        return F.pixel_shuffle(self.weights(features).sigmoid(), _STRIDE), F.pixel_shuffle(self.offsets(features), _STRIDE)
