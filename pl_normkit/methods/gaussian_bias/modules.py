"""The bias itself: a Gaussian of the distance between two patches, added to attention logits."""

from __future__ import annotations

__all__ = ["GaussianAttentionBias", "check_amplitude", "check_grid", "check_sigma", "gaussian_bias"]

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pl_normkit.errors import ConfigError, NormkitWarning

EPSILON = 1e-6
"""Added to sigma squared, so that a sigma that training brings to 0 gives a number: 1 on the diagonal, 0 beside it."""

Grid = tuple[int, int]


class GridSource(Protocol):
    """Knows the rows and columns of the patches that attention works on at this moment."""

    def grid_of(self, num_patches: int) -> Grid | None: ...


def gaussian_bias(grid_size: Grid, amplitude: Tensor, sigma: Tensor, num_prefix_tokens: int = 0) -> Tensor:
    """`amplitude^2 * exp(-distance^2 / (2 sigma^2))` for every pair of tokens, 0 where one of them is a prefix token.

    A Gaussian of the plane is the product of one along the rows and one along the columns, so `rows^2 + columns^2` exponentials are
    taken per head and not one per pair.

    Args:
        grid_size: rows and columns of patches; tokens run along the rows.
        amplitude: (heads,), its sign has no effect.
        sigma: (heads,), in patches.
        num_prefix_tokens: class, distillation and register tokens in front of the patches.

    Returns:
        (heads, L, L) in float32 (float64 for such parameters), L = num_prefix_tokens + rows * columns.

    >>> bias = gaussian_bias((1, 2), torch.ones(1), torch.ones(1))
    >>> [round(float(value), 3) for value in bias.flatten()]
    [1.0, 0.607, 0.607, 1.0]
    """
    rows, columns = grid_size
    dtype = torch.promote_types(amplitude.dtype, torch.float32)
    rate = (-0.5 / (sigma.to(dtype).square() + EPSILON))[:, None, None]
    along_rows = torch.exp(rate * _squared_distances(rows, rate))
    along_columns = along_rows if rows == columns else torch.exp(rate * _squared_distances(columns, rate))
    along_rows = amplitude.to(dtype).square()[:, None, None] * along_rows
    bias = along_rows[:, :, None, :, None] * along_columns[:, None, :, None, :]
    bias = bias.reshape(-1, rows * columns, rows * columns)
    return F.pad(bias, (num_prefix_tokens, 0, num_prefix_tokens, 0)) if num_prefix_tokens else bias


def _squared_distances(length: int, like: Tensor) -> Tensor:
    position = torch.arange(length, device=like.device, dtype=like.dtype)
    return (position[:, None] - position).square()


class GaussianAttentionBias(nn.Module):
    """A learnable Gaussian of the distance between two patches, to be added to attention logits before the softmax.

    `bias = module()` is (1 or heads, L, L), L = `num_prefix_tokens` + rows * columns, in float32; cast it to the dtype of the query. It
    broadcasts against logits (N, heads, L, L) and is a float `attn_mask` for `F.scaled_dot_product_attention`. No buffers are kept:
    distances are made where the parameters are, so the module also works after `to_empty`, on the meta device and under FSDP2.

    Args:
        grid_size: rows and columns of patches (an int for a square); the grid can differ from call to call.
        num_heads: one amplitude and one sigma per head; None gives one pair that all heads share.
        num_prefix_tokens: class, distillation and register tokens in front of the patches; their rows and columns are 0.
        amplitude: start value, not 0. It enters squared: the bias is never negative.
        sigma: start value in patches, positive.

    Attributes:
        amplitude: Parameter (1 or heads,).
        sigma: Parameter (1 or heads,).
        enabled: set to False to run the model without the bias, bit for bit as before it was added; not part of the state dict.

    Raises:
        ConfigError: for a start value or a size that is out of range.

    Both parameters are trained without weight decay: `param_groups` of this library and the GammaDecay callback leave them out by the type
    of this module, timm's optimizer factory because they have one dimension. A state dict without them is loaded strictly and
    leaves them as they are (weights from before the bias was added); one that holds one of the two lacks a key as usual.

    Source: arXiv 2305.04722; formula, start values, one pair per layer or per head and no weight decay are published (the authors' code).
    Zero for prefix tokens, the guard at sigma 0 and the factorization are derived here.
    """

    def __init__(
        self,
        grid_size: int | Sequence[int],
        num_heads: int | None = None,
        num_prefix_tokens: int = 0,
        amplitude: float = 1.0,
        sigma: float = 5.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.grid_size = check_grid(grid_size)
        self.num_heads = None if num_heads is None else _check_count(num_heads, "num_heads", least=1)
        self.num_prefix_tokens = _check_count(num_prefix_tokens, "num_prefix_tokens", least=0)
        self.start = (check_amplitude(amplitude), check_sigma(sigma))
        _warn_of_collapse(*self.start)
        self.amplitude = nn.Parameter(torch.empty(num_heads or 1, device=device, dtype=dtype))
        self.sigma = nn.Parameter(torch.empty(num_heads or 1, device=device, dtype=dtype))
        self.enabled = True
        self._grid_source: tuple[GridSource, ...] = ()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Put the start values back."""
        amplitude, sigma = self.start
        with torch.no_grad():
            self.amplitude.fill_(amplitude)
            self.sigma.fill_(sigma)

    def forward(self, grid_size: Grid | None = None) -> Tensor:
        """The bias (1 or heads, L, L) on `grid_size`, by default on the module's own grid."""
        return gaussian_bias(grid_size or self.grid_size, self.amplitude, self.sigma, self.num_prefix_tokens)

    def set_grid_size(self, grid_size: int | Sequence[int]) -> None:
        """Another grid from now on; sigma stays in patches, as in the authors' code."""
        self.grid_size = check_grid(grid_size)

    def follow(self, source: GridSource) -> None:
        """Ask `source` for the grid in `bias_for`; it is copied and pickled along with this module."""
        self._grid_source = (source,)

    def bias_for(self, num_tokens: int) -> Tensor:
        """The bias for `num_tokens` tokens, prefix included, on the grid that is seen now. Raises ConfigError where none fits."""
        num_patches = num_tokens - self.num_prefix_tokens
        followed = [source.grid_of(num_patches) for source in self._grid_source]
        grid = followed[0] if followed and followed[0] is not None else self.grid_size
        if grid[0] * grid[1] != num_patches:
            raise ConfigError(
                f"{num_tokens} tokens do not fit a grid of {grid[0]} x {grid[1]} patches and {self.num_prefix_tokens} prefix tokens",
                where="GaussianAttentionBias",
                fix="where patches are dropped, merged or padded the bias has no grid to work on; leave those layers out with filter_fn, "
                "or give the grid with set_grid_size",
            )
        bias: Tensor = self(grid)
        return bias

    def no_weight_decay(self) -> set[str]:
        """Parameters without weight decay, as timm's models name them."""
        return {"amplitude", "sigma"}

    def extra_repr(self) -> str:
        heads = "shared by all heads" if self.num_heads is None else f"num_heads={self.num_heads}"
        return f"grid_size={self.grid_size}, {heads}, num_prefix_tokens={self.num_prefix_tokens}"

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        if any(f"{prefix}{name}" in state_dict for name in self._parameters):
            super()._load_from_state_dict(state_dict, prefix, *rest)


def check_grid(grid_size: int | Sequence[int]) -> Grid:
    """Rows and columns. Raises ConfigError unless they are one or two positive ints."""
    sizes = (grid_size, grid_size) if isinstance(grid_size, int) else tuple(grid_size) if isinstance(grid_size, Sequence) else ()
    if len(sizes) != 2 or not all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in sizes):
        raise ConfigError("grid_size is the number of rows and of columns of patches", evidence=repr(grid_size), fix="write (14, 14)")
    return sizes[0], sizes[1]


def check_amplitude(amplitude: float) -> float:
    """The start value. Raises ConfigError for 0, where no gradient ever moves it, and for what is no number."""
    if not _is_finite(amplitude) or amplitude == 0:
        raise ConfigError(
            f"the amplitude starts at a number other than 0, not {amplitude!r}",
            evidence="it enters squared, so at 0 neither it nor sigma gets a gradient" if _is_finite(amplitude) else "",
            fix="start at 1; module.enabled = False switches a bias off",
        )
    return float(amplitude)


def check_sigma(sigma: float) -> float:
    """The start value in patches. Raises ConfigError unless positive: at 0 it gets no gradient."""
    if not _is_finite(sigma) or sigma <= 0:
        raise ConfigError(f"sigma starts at a positive number of patches, not {sigma!r}", fix="start at 5, or a third of the window")
    return float(sigma)


def _warn_of_collapse(amplitude: float, sigma: float) -> None:
    if abs(amplitude) >= 3 and sigma <= 2:
        warnings.warn(
            f"amplitude {amplitude:g} with sigma {sigma:g} lets each token attend to little but its own neighbours from the start "
            "(weight of the own patch 170 times uniform at amplitude 3, sigma 1); start at amplitude 1, sigma 5",
            NormkitWarning,
            stacklevel=3,
        )


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_count(value: int, name: str, least: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{name} is an int of at least {least}, not {value!r}", where="GaussianAttentionBias")
    return value
