"""`ScaleEqualizer`: frozen per-channel centring and scaling of what a fusion reads."""

from __future__ import annotations

__all__ = ["NAME", "PADDING_NAME", "MeanPadding", "ScaleEqualizer"]

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pl_normkit.errors import ConfigError, EditError

NAME = "scale_equalizer"
"""Name of the child module an equalizer becomes where it is inserted."""
PADDING_NAME = "mean_padding"

TINY_STD = 1e-6
ROUNDING = 1e-5
"""Of the fusion's largest std: less is the rounding error of a constant branch, which a batch norm enlarges by up to 1 / sqrt(eps)."""


class ScaleEqualizer(nn.Module):
    """`(x - mean) / std` with frozen statistics, one pair per channel; the identity until `set_statistics`.

    Its place is after the resize and before the fusion, one over all branches of a concatenation, or one on each operand of a sum.
    Input and output (N, C, ...) of any floating dtype, C the sum of `widths`; buffers are float32 and cast to the input's dtype.

    Args:
        widths: channels of each branch in the order of the concatenation.
        folds_into: layers that may take the statistics over, as paths relative to the module this is a child of; the first is the
            fusion's convolution, the last may be a batch norm. Empty where folding is impossible.
        obstacle: why folding is impossible, "" where it is possible.
        level: how many other equalizers of the model act on what it reads, one after the other; statistics are taken in this order.

    Attributes:
        scale: `1 / std`, shape (C,).
        shift: `-mean / std`, shape (C,).
        calibrated: 1 after `set_statistics`.

    Raises:
        ConfigError: for widths that are no positive numbers.
        EditError: in forward, when the input has another number of channels.

    Source: arXiv 2402.01149, abstract, for fixed statistics between resize and fusion; the form as a module is ours.
    """

    scale: Tensor
    shift: Tensor
    calibrated: Tensor

    def __init__(self, widths: Sequence[int], *, folds_into: Sequence[str] = (), obstacle: str = "", level: int = 0) -> None:
        super().__init__()
        if not widths or any(width < 1 for width in widths):
            raise ConfigError("widths are the channels of each branch", evidence=repr(list(widths)), fix="pass positive numbers")
        self.widths = tuple(int(width) for width in widths)
        self.folds_into = tuple(folds_into)
        self.obstacle = obstacle
        self.level = level
        channels = sum(self.widths)
        self.register_buffer("scale", torch.ones(channels))
        self.register_buffer("shift", torch.zeros(channels))
        self.register_buffer("calibrated", torch.zeros((), dtype=torch.int64))

    @property
    def mean(self) -> Tensor:
        """Mean taken off each channel, shape (C,), float64."""
        return -self.shift.double() / self.scale.double()

    @property
    def std(self) -> Tensor:
        """Standard deviation each channel is divided by, shape (C,), float64."""
        return 1 / self.scale.double()

    @property
    def is_calibrated(self) -> bool:
        return bool(self.calibrated)

    @torch.no_grad()
    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Freeze these statistics, per branch of shape (len(widths),) or per channel of shape (C,). Raises ConfigError otherwise."""
        channels = len(self.scale)
        widths = torch.tensor(self.widths)
        spread = []
        for given in (mean.double().cpu(), std.double().cpu()):
            if given.shape == (channels,):
                spread.append(given)
            elif given.shape == (len(widths),):
                spread.append(given.repeat_interleave(widths))
            else:
                raise ConfigError("statistics are given per branch or per channel", evidence=f"shape {tuple(given.shape)}")
        if not bool((torch.isfinite(spread[0]) & torch.isfinite(spread[1]) & (spread[1] > 0)).all()):
            raise ConfigError("statistics must be finite and standard deviations positive")
        self.scale.copy_(1 / spread[1])
        self.shift.copy_(-spread[0] / spread[1])
        self.calibrated.fill_(1)

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor) or x.dim() < 3 or x.shape[1] != len(self.scale):
            seen = f"{tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            expected = f"(N, {len(self.scale)}, ...)"
            raise EditError(f"a ScaleEqualizer for {expected} features got something else", evidence=seen, fix="undo the edit")
        spatial = (1,) * (x.dim() - 2)
        return torch.addcmul(self.shift.to(x.dtype).view(-1, *spatial), x, self.scale.to(x.dtype).view(-1, *spatial))

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        """A checkpoint from before the equalizer leaves it as the identity it is; a calibrated one misses its keys and says so."""
        if self.is_calibrated or any(f"{prefix}{name}" in state_dict for name in self._buffers):
            super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"widths={self.widths}, calibrated={self.is_calibrated}"


class MeanPadding(nn.Module):
    """Pads (N, C, ...) features with one value per channel: with its mean, what a folded equalizer's zero padding stood for.

    Args:
        mean: shape (C,).
        padding: cells added on both sides of each spatial dimension.
    """

    mean: Tensor

    def __init__(self, mean: Tensor, padding: Sequence[int]) -> None:
        super().__init__()
        self.padding = tuple(padding)
        self.register_buffer("mean", mean.clone())

    def forward(self, x: Tensor) -> Tensor:
        sizes = [size + 2 * pad for size, pad in zip(x.shape[2:], self.padding, strict=True)]
        values = self.mean.to(x.dtype).view(-1, *(1,) * len(sizes))
        padded = values.expand(x.shape[0], -1, *sizes).clone()
        inner = padded
        for dim, (size, pad) in enumerate(zip(x.shape[2:], self.padding, strict=True), start=2):
            inner = inner.narrow(dim, pad, size)
        inner.copy_(x)
        return padded

    def extra_repr(self) -> str:
        return f"channels={len(self.mean)}, padding={self.padding}"
