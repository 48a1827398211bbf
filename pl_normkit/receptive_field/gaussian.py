"""Least-squares fit of a Gaussian to a map, by Levenberg and Marquardt's method."""

from __future__ import annotations

__all__ = ["GaussianFit", "fit_gaussian"]

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pl_normkit.errors import DataError


@dataclass(frozen=True)
class GaussianFit:
    """A / (2 pi sx sy) exp(-((x - xc)^2 / (2 sx^2) + (y - yc)^2 / (2 sy^2))), OpenERF's form.

    Attributes:
        amplitude: A, the mass under the surface.
        y, x: centre in pixels.
        sigma_y, sigma_x: standard deviations in pixels.
        r2: 1 - var(residual) / var(map); 1 is a perfect Gaussian.
    """

    amplitude: float
    y: float
    x: float
    sigma_y: float
    sigma_x: float
    r2: float


def fit_gaussian(surface: Tensor) -> GaussianFit:
    """The Gaussian nearest to a map (H, W); of two starts, one wide and one narrow, the better fit counts.

    Raises DataError for a map that is constant.
    """
    data = surface.double().cpu()
    height = float(data.max())
    if not height > float(data.min()):
        raise DataError("there is no Gaussian to fit", evidence="the map is constant")
    data = data / height
    return max((_refine(data, start, height) for start in _starts(data)), key=lambda fit: fit.r2)


def _starts(data: Tensor) -> list[Tensor]:
    """Height, centre and spreads (peak, y, x, sy, sx): from the moments of the mass, and a narrow one on the peak."""
    ys, xs = torch.arange(data.shape[0]).double(), torch.arange(data.shape[1]).double()
    weights = data.clamp(min=0) / data.clamp(min=0).sum()
    y, x = float((weights.sum(1) * ys).sum()), float((weights.sum(0) * xs).sum())
    sy, sx = (float((weights.sum(axis) * (at - mid) ** 2).sum()) ** 0.5 for axis, at, mid in ((1, ys, y), (0, xs, x)))
    top = int(data.argmax())
    narrow = max(0.7, (float((data > 0.5).sum()) / math.pi) ** 0.5)
    peak_y, peak_x = divmod(top, data.shape[1])
    wide = [float(data[round(y), round(x)]) or 0.1, y, x, max(sy, 0.7), max(sx, 0.7)]
    return [torch.tensor(start, dtype=torch.float64) for start in (wide, [1.0, float(peak_y), float(peak_x), narrow, narrow])]


def _refine(data: Tensor, start: Tensor, scale: float, steps: int = 60) -> GaussianFit:
    parameters, damping = start, 1e-2
    residual, jacobian = _linearize(data, parameters)
    for _ in range(steps):
        hessian, slope = jacobian @ jacobian.T, jacobian @ residual
        step = torch.linalg.lstsq(hessian + damping * torch.diag(hessian.diagonal() + 1e-12), slope).solution
        trial, trial_jacobian = _linearize(data, parameters + step)
        if trial.square().sum() < residual.square().sum():
            parameters, residual, jacobian, damping = parameters + step, trial, trial_jacobian, damping / 5
            if step.abs().max() < 1e-9 * (1 + parameters.abs().max()):
                break
        else:
            damping *= 4
            if damping > 1e12:
                break
    peak, y, x, sy, sx = parameters.tolist()
    r2 = 1 - float(residual.var(correction=0) / data.var(correction=0))
    return GaussianFit(peak * scale * 2 * math.pi * abs(sy * sx), y, x, abs(sy), abs(sx), r2)


def _linearize(data: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
    """Residual (H W,) and its Jacobian's negative (5, H W)."""
    peak, y, x, sy, sx = parameters.tolist()
    dy, dx = torch.arange(data.shape[0]).double() - y, torch.arange(data.shape[1]).double() - x
    sy, sx = sy or 1e-6, sx or 1e-6
    bell_y, bell_x = torch.exp(-((dy / sy) ** 2) / 2), torch.exp(-((dx / sx) ** 2) / 2)
    columns = [
        torch.outer(bell_y, bell_x),
        torch.outer(peak * bell_y * dy / sy**2, bell_x),
        torch.outer(peak * bell_y, bell_x * dx / sx**2),
        torch.outer(peak * bell_y * dy**2 / sy**3, bell_x),
        torch.outer(peak * bell_y, bell_x * dx**2 / sx**3),
    ]
    residual = data - peak * columns[0]
    return residual.flatten(), torch.stack([column.flatten() for column in columns])
