"""Unified normalization: the geometric mean of the last second moments, outliers left out, and a compensated gradient."""

from __future__ import annotations

__all__ = ["OPERATOR", "UnifiedNorm"]

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pl_normkit.methods.norm_operators.operators import OldNorm, Operator
from pl_normkit.methods.norm_operators.places import row_norms
from pl_normkit.methods.norm_operators.rows import RowNorm, mean_over_tokens

FORGET = 0.1
UNCOMPENSATED = 1000
"""Steps before which the gradient is never rescaled."""


class UnifiedNorm(RowNorm):
    """gamma * x / sqrt(moment + eps) + beta; the running moment in evaluation, the geometric mean of the last `window` in training.

    During the warm-up, and on a step whose window is an outlier (arithmetic minus geometric mean of a channel above `window` times the
    variance of the recorded roots), the batch's own moment is used; an outlier's slot gets the running one. `skipped` counts outliers.
    Each training forward moves the buffers, so a recomputed one (gradient checkpointing) moves them twice.
    """

    takes = ("mask",)

    def __init__(self, old: OldNorm, warmup: int, window: int, outliers: bool) -> None:
        super().__init__(old)
        self.warmup, self.window, self.outliers = warmup, window, outliers
        self.running_var: Tensor
        self.moments: Tensor
        self.gradient_means: Tensor
        self.gradient_mean: Tensor
        self.steps: Tensor
        self.skipped: Tensor
        zeros = torch.zeros_like(old.ones())
        self.register_buffer("running_var", old.ones())
        self.register_buffer("moments", zeros.repeat(window, 1))
        self.register_buffer("gradient_means", zeros.repeat(window, 1))
        self.register_buffer("gradient_mean", zeros)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long, device=old.device))
        self.register_buffer("skipped", torch.zeros((), dtype=torch.long, device=old.device))

    def scaled(self, rows: Tensor) -> Tensor:
        if not self.training:
            return self._affine(rows * torch.rsqrt(self.running_var + self.eps), None)
        return self._affine(*self._train(rows))

    def _affine(self, z: Tensor, compensation: Tensor | None) -> Tensor:
        weight: Tensor | None = self.weight
        if weight is not None and compensation is not None:
            weight = weight.detach() + (weight - weight.detach()) * compensation  # the same value; its gradient is rescaled
        z = z if weight is None else z * weight
        return z if self.bias is None else z + self.bias

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _train(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            self.steps += 1
            moment = mean_over_tokens(rows.square(), self.mask)[0].to(self.running_var.dtype)
            slot = (torch.arange(self.window, device=self.steps.device) == self.steps % self.window)[:, None]
            spread = self.moments.sqrt().var()
            self.moments.copy_(torch.where(slot, moment, self.moments))
            geometric = self.moments.log().mean(0).exp()
            is_outlier = ((self.moments.mean(0) - geometric) > spread * self.window).any()
            is_outlier = is_outlier & (self.steps >= self.warmup) & self.outliers
            self.moments.copy_(torch.where(slot & is_outlier, self.running_var, self.moments))
            self.skipped += is_outlier
            is_skipped = is_outlier | (self.window == 1)
            is_early = (self.steps <= self.window) | (self.steps < self.warmup) | is_skipped
            used = torch.where(is_early, moment, geometric)
            ratio = ((used + self.eps) / (self.running_var + self.eps)).sqrt().clamp(1 / 5, 5)
            is_plain = (self.steps <= max(UNCOMPENSATED, self.warmup)) | is_skipped
            ratio = torch.where(is_plain, torch.ones_like(ratio), ratio)
            self.running_var.lerp_(used, FORGET)
        z: Tensor = _Normalize.apply(rows, used + self.eps, ratio, slot, is_early, is_skipped, self)
        return z, ratio


class _Normalize(torch.autograd.Function):
    """rows / sqrt(used); the gradient subtracts a running mean of gradient times output, and moves it."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, used: Tensor, ratio: Tensor, slot: Tensor, is_early: Tensor, is_skipped: Tensor, norm: UnifiedNorm
    ) -> Tensor:
        z = rows * torch.rsqrt(used)
        ctx.save_for_backward(z, used, ratio, slot, is_early, is_skipped)
        ctx.norm, ctx.mask = norm, norm.mask
        return z

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None, None, None]:
        z, used, ratio, slot, is_early, is_skipped = ctx.saved_tensors
        norm: UnifiedNorm = ctx.norm
        gradient = gradients[0] * ratio
        product = mean_over_tokens(gradient * z, ctx.mask)[0].to(norm.gradient_mean.dtype)
        recorded = torch.where(is_skipped, norm.gradient_mean, product)
        norm.gradient_means.copy_(torch.where(slot, recorded, norm.gradient_means))
        mean = torch.where(is_early, product, norm.gradient_means.mean(0))
        norm.gradient_mean.lerp_(mean, FORGET)
        inner = gradient - torch.where(is_skipped, mean, norm.gradient_mean) * z
        return (inner * torch.rsqrt(used)).to(z.dtype), None, None, None, None, None, None


def _make(old: OldNorm, options: Mapping[str, Any]) -> nn.Module:
    return UnifiedNorm(old, options["warmup"], options["window"], options["outliers"])


OPERATOR = Operator(
    name="unified",
    formula="gamma x / sqrt(v + eps) + beta, v the geometric mean of the last M second moments a channel",
    source="Unified Normalization, arXiv 2208.01313 (code)",
    replaces="layer norms and RMS norms",
    places=row_norms,
    make=_make,
    kept="no",
    when="vision transformers whose norms shall fold into the next layer after training; outliers=False for language, as its code advises",
    options={"warmup": 4000, "window": 4, "outliers": True},
    needs="padding mask by `norm_inputs`; statistics are those of all ranks",
)
