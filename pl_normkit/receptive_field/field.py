"""`ReceptiveField`: the measured map, and what is read from it."""

from __future__ import annotations

__all__ = ["ReceptiveField"]

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pl_normkit.errors import ConfigError
from pl_normkit.receptive_field.gaussian import GaussianFit, fit_gaussian
from pl_normkit.receptive_field.picture import paint, save_picture

if TYPE_CHECKING:
    import numpy as np

RADII = (5, 10, 20, 30, 40, 60, 80)
"""Radii in pixels at which OpenERF reports the cumulative mass."""
DIRECTIONS = tuple((dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if dy or dx)

Point = tuple[float, float]


@dataclass(frozen=True)
class ReceptiveField:
    """How much each input pixel drives one unit.

    Attributes:
        map: float64 (H, W) on the CPU, not negative; sums to 1, or is 0 everywhere where no gradient was positive.
        layer: the module whose output holds the unit; "" is the model itself.
        grid: (height, width) of that output, in cells or tokens.
        position: (y, x) of the unit in the grid.
        images: how many images were averaged.
    """

    map: Tensor = field(repr=False)
    layer: str
    grid: tuple[int, int]
    position: tuple[int, int]
    images: int

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the input, in pixels."""
        return self.map.shape[0], self.map.shape[1]

    @property
    def unit(self) -> Point:
        """(y, x) of the middle of the unit's cell in the image, in pixels; radii are measured from here."""
        (height, width), (rows, columns), (y, x) = self.size, self.grid, self.position
        return (y + 0.5) * height / rows - 0.5, (x + 0.5) * width / columns - 0.5

    def mass_within(self, radius: float, centre: Point | None = None) -> float:
        """Mass within `radius` pixels of `centre` (y, x), by default of the unit. OpenERF takes the image's (H // 2, W // 2)."""
        return float(self.map[self._distances(centre) <= radius].sum())

    def radius_holding(self, share: float, centre: Point | None = None) -> float:
        """Smallest radius in pixels around `centre` that holds `share` of the mass; NaN for an empty map.

        Raises ConfigError for a share outside (0, 1].
        """
        _check_share(share)
        if not self.map.any():
            return math.nan
        distance, order = self._distances(centre).flatten().sort()
        mass = self.map.flatten()[order].cumsum(0)
        reached = int(torch.searchsorted(mass, share * float(mass[-1]) * (1 - 1e-12)))
        return float(distance[min(reached, len(distance) - 1)])

    def area_share(self, share: float = 0.9) -> float:
        """Share of the crop that the strongest pixels cover which together hold `share` of the mass; 0 for an empty map."""
        _check_share(share)
        mass = self.map.flatten().sort(descending=True).values.cumsum(0)
        if not self.map.any():
            return 0.0
        return (int(torch.searchsorted(mass, share * float(mass[-1]) * (1 - 1e-12))) + 1) / len(mass)

    @property
    def centre_of_mass(self) -> Point:
        """(y, x) in pixels; NaN for an empty map."""
        ys, xs = self._axes()
        total = self.map.sum()
        return float((self.map.sum(1) * ys).sum() / total), float((self.map.sum(0) * xs).sum() / total)

    @property
    def spread(self) -> tuple[float, float]:
        """Standard deviations in pixels along the longest and the shortest axis of the map's mass."""
        (y, x), (ys, xs) = self.centre_of_mass, self._axes()
        ys, xs = ys - y, xs - x
        total = self.map.sum()
        cross = float((self.map * ys[:, None] * xs).sum() / total)
        var_y = float((self.map.sum(1) * ys**2).sum() / total)
        var_x = float((self.map.sum(0) * xs**2).sum() / total)
        middle, half = (var_y + var_x) / 2, math.hypot((var_y - var_x) / 2, cross)
        return math.sqrt(max(0.0, middle + half)), math.sqrt(max(0.0, middle - half))

    @property
    def anisotropy(self) -> float:
        """Long over short spread: 1 is round, `inf` a line."""
        long, short = self.spread
        return long / short if short > 0 else math.inf if long > 0 else math.nan

    def fit_gaussian(self) -> GaussianFit:
        """The axis-parallel Gaussian nearest to the map, by least squares. Raises DataError for an empty map."""
        return fit_gaussian(self.map)

    def star_mask(self, rates: Sequence[int], stride: int, reach: int = 0) -> Tensor:
        """Pixels of the cells that three-by-three kernels of these atrous rates read for the unit: bool (H, W).

        Args:
            rates: atrous rates, in cells.
            stride: pixels per cell of the map that ASPP reads.
            reach: cells around each tap that count too: 2 for a 3x3 convolution and a bilinear resize behind ASPP.

        Source: derived here; the words star-shaped are not known to be the paper's.
        """
        (height, width), (y, x) = self.size, self._cell(stride)
        rows = torch.arange(height) // stride - y
        columns = torch.arange(width) // stride - x
        taps = [(0, 0), *((rate * dy, rate * dx) for rate in rates for dy, dx in DIRECTIONS)]
        near = [((rows - dy).abs() <= reach)[:, None] & ((columns - dx).abs() <= reach) for dy, dx in taps]
        return torch.stack(near).any(0)

    def star_mass(self, rates: Sequence[int], stride: int, reach: int = 0) -> float:
        """Mass on `star_mask`."""
        return float(self.map[self.star_mask(rates, stride, reach)].sum())

    def star_taps_outside(self, rates: Sequence[int], stride: int) -> float:
        """Share of the outer taps that fall outside the image: the star is truncated."""
        (height, width), (y, x) = self.size, self._cell(stride)
        rows, columns = math.ceil(height / stride), math.ceil(width / stride)
        taps = [(y + rate * dy, x + rate * dx) for rate in rates for dy, dx in DIRECTIONS]
        return sum(not (0 <= row < rows and 0 <= column < columns) for row, column in taps) / len(taps)

    def metrics(self) -> dict[str, Any]:
        """Everything above as plain numbers, by name; lengths in pixels."""
        empty = not bool(self.map.any())
        fit = None if empty else self.fit_gaussian()
        return {
            "images": self.images,
            "unit (y, x)": self.unit,
            "centre of mass (y, x)": self.centre_of_mass,
            "radius holding 50 %": self.radius_holding(0.5),
            "radius holding 90 %": self.radius_holding(0.9),
            "mass within radius": {radius: self.mass_within(radius) for radius in RADII},
            "anisotropy": math.nan if empty else self.anisotropy,
            "share of the crop holding 90 %": self.area_share(0.9),
            "Gaussian sigma (y, x)": None if fit is None else (fit.sigma_y, fit.sigma_x),
            "Gaussian r^2": None if fit is None else fit.r2,
        }

    def __str__(self) -> str:
        head = f"effective receptive field of {self.layer or 'the output'} at {self.position} of {self.grid}"
        return "\n".join([head, *(f"  {name}: {_text(value)}" for name, value in self.metrics().items())])

    def picture(self) -> np.ndarray[Any, Any]:
        """The map as an image, uint8 (H, W, 3), each map on its own scale (OpenERF's): compare numbers, not colours.

        Raises ConfigError where matplotlib is missing.
        """
        return paint(self.map)

    def save(self, path: str | Path) -> None:
        """Write `picture()` as a PNG. Raises ConfigError where matplotlib is missing or the file cannot be written."""
        save_picture(self.map, Path(path))

    def _cell(self, stride: int) -> tuple[int, int]:
        if stride < 1:
            raise ConfigError("the stride must be a positive whole number", evidence=repr(stride))
        y, x = self.unit
        return int(y + 0.5) // stride, int(x + 0.5) // stride

    def _axes(self) -> tuple[Tensor, Tensor]:
        return torch.arange(self.size[0], dtype=torch.float64), torch.arange(self.size[1], dtype=torch.float64)

    def _distances(self, centre: Point | None) -> Tensor:
        (y, x), (ys, xs) = self.unit if centre is None else centre, self._axes()
        return torch.hypot((ys - y)[:, None], (xs - x)[None])


def _check_share(share: float) -> None:
    if not 0 < share <= 1:
        raise ConfigError("a share of the mass lies in (0, 1]", evidence=repr(share))


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_text(item)}" for key, item in value.items())
    if isinstance(value, tuple):
        return f"({', '.join(map(_text, value))})"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
