"""Stochastic average pooling as modules: torch's own classes with `keep` and `scale` added."""

from __future__ import annotations

__all__ = ["StochasticAdaptiveAvgPool1d", "StochasticAdaptiveAvgPool2d", "StochasticAvgPool1d", "StochasticAvgPool2d"]

from collections.abc import Sequence

from torch import Tensor, nn

from pl_normkit.methods.stochastic_pooling.functional import (
    Scale,
    Size,
    check_keep,
    check_scale,
    stochastic_adaptive_avg_pool,
    stochastic_avg_pool,
)


class StochasticAvgPool1d(nn.AvgPool1d):
    """`torch.nn.AvgPool1d` that averages a random subset of each window while training.

    Args:
        kernel_size, stride, padding, ceil_mode, count_include_pad: as in torch.
        keep: share of each window that stays, in (0, 1]; `max(1, round(keep * cells))` cells of it.
        scale: "sqrt", "none", "match" or a number, see `stochastic_avg_pool`.

    Shapes: (N, C, L) -> (N, C, L_out), or without N.

    Raises:
        ConfigError: for keep or scale out of range; DataError, when called, for unfit tensors.

    Source: definition derived in this project from public summaries of arXiv 2409.16630.
    """

    def __init__(
        self,
        kernel_size: int | tuple[int],
        stride: int | tuple[int] | None = None,
        padding: int | tuple[int] = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        *,
        keep: float = 0.5,
        scale: Scale = "sqrt",
    ) -> None:
        super().__init__(kernel_size, kernel_size if stride is None else stride, padding, ceil_mode, count_include_pad)
        self.keep = check_keep(keep)
        self.scale = check_scale(scale)

    def forward(self, x: Tensor) -> Tensor:
        arguments = (self.kernel_size, self.stride, self.padding, self.ceil_mode, self.count_include_pad)
        return stochastic_avg_pool(x, *arguments, dims=1, keep=self.keep, scale=self.scale, training=self.training)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, keep={self.keep}, scale={self.scale!r}"


class StochasticAvgPool2d(nn.AvgPool2d):
    """`torch.nn.AvgPool2d` that averages a random subset of each window while training.

    Args:
        kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override: as in torch.
        keep: share of each window that stays, in (0, 1].
        scale: "sqrt", "none", "match" or a number, see `stochastic_avg_pool`.

    Shapes: (N, C, H, W) -> (N, C, H_out, W_out), or without N.

    Raises:
        ConfigError: for keep or scale out of range; DataError, when called, for unfit tensors.

    Source: definition derived in this project from public summaries of arXiv 2409.16630.
    """

    def __init__(
        self,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] | None = None,
        padding: int | tuple[int, int] = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
        *,
        keep: float = 0.5,
        scale: Scale = "sqrt",
    ) -> None:
        super().__init__(kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
        self.keep = check_keep(keep)
        self.scale = check_scale(scale)

    def forward(self, x: Tensor) -> Tensor:
        arguments = (self.kernel_size, self.stride, self.padding, self.ceil_mode, self.count_include_pad, self.divisor_override)
        return stochastic_avg_pool(x, *arguments, keep=self.keep, scale=self.scale, training=self.training)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, keep={self.keep}, scale={self.scale!r}"


class StochasticAdaptiveAvgPool1d(nn.AdaptiveAvgPool1d):
    """`torch.nn.AdaptiveAvgPool1d` that averages a random subset of each bin while training.

    Args:
        output_size: as in torch.
        keep: share of each bin that stays, in (0, 1].
        scale: "sqrt", "none", "match" or a number, see `stochastic_avg_pool`.

    Shapes: (N, C, L) -> (N, C, output_size), or without N.

    Source: definition derived in this project from public summaries of arXiv 2409.16630.
    """

    def __init__(self, output_size: int | Sequence[int | None] | None, *, keep: float = 0.5, scale: Scale = "sqrt") -> None:
        super().__init__(output_size)  # type: ignore[arg-type]
        self.keep = check_keep(keep)
        self.scale = check_scale(scale)

    def forward(self, x: Tensor) -> Tensor:
        return stochastic_adaptive_avg_pool(x, self.output_size, dims=1, keep=self.keep, scale=self.scale, training=self.training)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, keep={self.keep}, scale={self.scale!r}"


class StochasticAdaptiveAvgPool2d(nn.AdaptiveAvgPool2d):
    """`torch.nn.AdaptiveAvgPool2d` that averages a random subset of each bin while training.

    Args:
        output_size: as in torch: 1 for a global pool, 1, 2, 3, 6 in a pyramid pooling module.
        keep: share of each bin that stays, in (0, 1].
        scale: "sqrt", "none", "match" or a number, see `stochastic_avg_pool`.

    Shapes: (N, C, H, W) -> (N, C, *output_size), or without N.

    Source: definition derived in this project from public summaries of arXiv 2409.16630.
    """

    def __init__(self, output_size: Size | Sequence[int | None] | None, *, keep: float = 0.5, scale: Scale = "sqrt") -> None:
        super().__init__(output_size)  # type: ignore[arg-type]
        self.keep = check_keep(keep)
        self.scale = check_scale(scale)

    def forward(self, x: Tensor) -> Tensor:
        return stochastic_adaptive_avg_pool(x, self.output_size, keep=self.keep, scale=self.scale, training=self.training)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, keep={self.keep}, scale={self.scale!r}"
