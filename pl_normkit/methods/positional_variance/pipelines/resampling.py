"""How much variance a positional embedding lost when it was resampled to another grid.

An embedding interpolated from h x w to H x W patches has rank h along its rows and w along its columns (derived here): as long as it
has not been trained at the new size, both the old grid and the old embedding can be read off the new one.
"""

from __future__ import annotations

__all__ = ["Resampling", "as_rows", "find_resampling", "looks_trained", "patch_rows", "recover_original"]

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pl_normkit.methods.positional_variance.find import PositionalSite, added_positions, patch_variance

# (mode, antialias): timm's default, torch's and transformers' default, and bilinear.
_KERNELS = (("bicubic", True), ("bicubic", False), ("bilinear", False))
_RANK_TOLERANCE = 1e-5
_FIT_TOLERANCE = 1e-4
_TRAINED_CORRELATION = 0.1


@dataclass(frozen=True)
class Resampling:
    """One resampling of patch positions.

    Attributes:
        old: variance over channels of the original positions, mean over positions.
        new: the same after resampling.
        old_grid: rows and columns of the original, None where only its values are known.
        new_grid: rows and columns now, None where unknown.
        in_forward: whether the forward pass resamples; otherwise the parameter itself was resampled.
    """

    old: float
    new: float
    old_grid: tuple[int, int] | None
    new_grid: tuple[int, int] | None
    in_forward: bool

    @property
    def k(self) -> float:
        """Var[P_resampled] / Var[P_original]; the variance is kept where it is 1."""
        return self.new / self.old if self.old > 0 else 1.0

    def __str__(self) -> str:
        grids = [f"{grid[0]}x{grid[1]}" if grid else "?" for grid in (self.old_grid, self.new_grid)]
        return f"{grids[0]} -> {grids[1]}, k = {self.k:.4f}"


def find_resampling(model: nn.Module, site: PositionalSite) -> Resampling | None:
    """The resampling that the trace shows, else the one that the values of the parameter show; None where there is neither."""
    parameter = model.get_parameter(site.parameter).detach()
    if parameter.is_meta or site.grid is None:
        return None
    rows = patch_rows(model, site)
    if site.is_resampled:
        added = added_positions(model, site)[site.first : site.first + site.count]
        old = as_rows(parameter, site)[rows]
        return Resampling(patch_variance(old), patch_variance(added), _square(len(old)), site.grid, in_forward=True)
    found = recover_original(as_rows(parameter, site)[rows], site.grid)
    if found is None:
        return None
    original, old_grid = found
    new = patch_variance(as_rows(parameter, site)[rows])
    return Resampling(patch_variance(original), new, old_grid, site.grid, in_forward=False)


def as_rows(parameter: Tensor, site: PositionalSite) -> Tensor:
    """An embedding as (positions, channels)."""
    return parameter.reshape(-1, site.width) if parameter.shape[-1] == site.width else parameter.flatten(-2).squeeze(0).T


def patch_rows(model: nn.Module, site: PositionalSite) -> Tensor:
    """Indices of the embedding's positions that reach patch tokens; the others belong to class and other prefix tokens.

    Read from the gradient of what is added at the patch tokens, so that slices, gathers and interpolations count.
    """
    parameter = model.get_parameter(site.parameter)
    probe = torch.ones_like(parameter, dtype=torch.float32, device="cpu" if parameter.is_meta else parameter.device).requires_grad_()
    with torch.inference_mode(False), torch.enable_grad():
        added = added_positions(model, site, probe)[site.first : site.first + site.count]
        weights = torch.linspace(0.5, 1.5, added.shape[0], device=added.device).unsqueeze(1)  # no cancelling in a sum of kernels
        (gradient,) = torch.autograd.grad((added * weights).sum(), probe)
    return as_rows(gradient, site).abs().amax(-1).nonzero().squeeze(-1)


def recover_original(positions: Tensor, grid: tuple[int, int]) -> tuple[Tensor, tuple[int, int]] | None:
    """The embedding (h * w, D) that was interpolated to `positions` (H * W, D), with its grid; None where none was."""
    values = positions.detach().double().cpu().reshape(*grid, -1)
    if not bool(values.isfinite().all()):
        return None
    old_grid = (_rank(values.flatten(1)), _rank(values.transpose(0, 1).flatten(1)))
    if old_grid == grid or min(old_grid) < 2 or old_grid[0] > grid[0] or old_grid[1] > grid[1]:
        return None
    for mode, antialias in _KERNELS:
        rows, columns = (_kernel(old, new, mode, antialias) for old, new in zip(old_grid, grid, strict=True))
        original = torch.einsum("hH,HWd,wW->hwd", torch.linalg.pinv(rows), values, torch.linalg.pinv(columns))
        again = torch.einsum("Hh,hwd,Ww->HWd", rows, original, columns)
        if float((again - values).norm()) <= _FIT_TOLERANCE * float(values.norm()):
            return original.flatten(0, 1), old_grid
    return None


def _rank(matrix: Tensor) -> int:
    singular = torch.linalg.svdvals(matrix @ matrix.T).clamp(min=0).sqrt()
    return int((singular > _RANK_TOLERANCE * singular[0]).sum())


def _kernel(old: int, new: int, mode: str, antialias: bool) -> Tensor:
    """Weights (new, old) of the interpolation along one side."""
    lines = torch.eye(old, dtype=torch.float64).reshape(1, old, old, 1).expand(1, old, old, 2)
    resized = F.interpolate(lines, size=(new, 2), mode=mode, align_corners=False, antialias=antialias)
    return resized[0, :, :, 0].T


def looks_trained(positions: Tensor, grid: tuple[int, int]) -> bool:
    """Whether neighbouring positions are alike, as training makes them and no common initialization does; (H * W, D)."""
    values = positions.detach().double().reshape(*grid, -1)
    values = F.normalize(values - values.mean(-1, keepdim=True), dim=-1)
    pairs = [(values[1:] * values[:-1]).sum(-1).mean(), (values[:, 1:] * values[:, :-1]).sum(-1).mean()]
    return float(torch.stack(pairs).nanmean()) > _TRAINED_CORRELATION


def _square(count: int) -> tuple[int, int] | None:
    side = math.isqrt(count)
    return (side, side) if side * side == count else None
