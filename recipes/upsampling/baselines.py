"""Guided upsampling without training: what the network is compared with."""

from __future__ import annotations

__all__ = ["baselines", "joint_bilateral"]

import importlib
import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from pl_normkit.methods.box_supervision import refine_by_guide
from pl_normkit.recipes.upsampling.resample import enlarge

Baseline = Callable[[Tensor, Tensor], Tensor]
"""From guidance (3, H, W) in [0, 1] and a coarse map (C, h, w) scaled to [0, 1], to (C, H, W)."""


def baselines() -> dict[str, Baseline]:
    """By name; OpenCV's guided filter where its contributed modules are installed."""
    found: dict[str, Baseline] = {
        "bicubic": lambda guidance, coarse: enlarge(coarse, (guidance.shape[-2], guidance.shape[-1])),
        "guided filter (grey guide)": _guided,
        "joint bilateral": joint_bilateral,
    }
    if _has_ximgproc():
        found["guided filter (OpenCV, colour guide)"] = _guided_by_opencv
    return found


def _radius(guidance: Tensor, coarse: Tensor) -> int:
    return guidance.shape[-1] // coarse.shape[-1]


def _guided(guidance: Tensor, coarse: Tensor) -> Tensor:
    start = enlarge(coarse, (guidance.shape[-2], guidance.shape[-1]))
    return refine_by_guide(guidance, start, radius=_radius(guidance, coarse))


def joint_bilateral(guidance: Tensor, coarse: Tensor, *, reach: int = 2, sigma_space: float = 0.8, sigma_range: float = 0.1) -> Tensor:
    """Each fine pixel is a mean of the coarse pixels around, weighted by distance and by likeness of the guide's colours.

    Source: Kopf, Cohen, Lischinski and Uyttendaele, "Joint Bilateral Upsampling", SIGGRAPH 2007, equation (3).

    Args:
        guidance: (3, H, W) in [0, 1].
        coarse: (C, h, w); H = factor * h, W = factor * w.
        reach: coarse pixels on each side.
        sigma_space: of distances, in coarse pixels.
        sigma_range: of colour differences.
    """
    height, width = guidance.shape[-2:]
    rows, columns = (
        (torch.arange(n, device=coarse.device) + 0.5) * m / n - 0.5 for n, m in zip((height, width), coarse.shape[-2:], strict=True)
    )
    small = F.interpolate(guidance[None], coarse.shape[-2:], mode="area")[0]
    total, weights = torch.zeros(len(coarse), height, width, device=coarse.device), torch.zeros(height, width, device=coarse.device)
    for step in range(-reach, reach + 1):
        for side in range(-reach, reach + 1):
            y, x = (positions.round().long() + shift for positions, shift in ((rows, step), (columns, side)))
            distance = ((y - rows) ** 2)[:, None] + (x - columns) ** 2
            y, x = y.clamp(0, coarse.shape[-2] - 1), x.clamp(0, coarse.shape[-1] - 1)
            colour = (guidance - small[:, y][:, :, x]).square().mean(0)
            weight = (-distance / (2 * sigma_space**2) - colour / (2 * sigma_range**2)).exp() + 1e-12
            total += weight * coarse[:, y][:, :, x]
            weights += weight
    return total / weights


def _has_ximgproc() -> bool:
    return importlib.util.find_spec("cv2") is not None and hasattr(importlib.import_module("cv2"), "ximgproc")


def _guided_by_opencv(guidance: Tensor, coarse: Tensor) -> Tensor:
    ximgproc = importlib.import_module("cv2").ximgproc
    start = enlarge(coarse, (guidance.shape[-2], guidance.shape[-1]))
    image = guidance.permute(1, 2, 0).cpu().numpy()
    planes = [ximgproc.guidedFilter(image, plane.cpu().numpy(), _radius(guidance, coarse), 1e-3) for plane in start]
    return torch.stack([torch.from_numpy(plane) for plane in planes]).to(coarse.device)
