"""Losses that cannot blow up on finite predictions: scale-invariant log, root mean square, binary, focal, and a power of another."""

from __future__ import annotations

__all__ = ["BinaryFocalLoss", "BinaryLogLoss", "PoweredLoss", "RMSELoss", "SILogLoss"]

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pl_normkit.errors import ConfigError
from pl_normkit.methods.nan_safety.ops import at_least_float32, masked_moments, safe_log, safe_power, safe_sqrt

Reduction = Literal["mean", "sum", "none"]


class SILogLoss(nn.Module):
    """Scale-invariant log loss for depth, `weight * D` or `weight * sqrt(D)` with D = var(g) + (1 - variance_focus) mean(g)^2
    and g = log(prediction) - log(target) over the valid pixels.

    Without valid pixels the loss is 0 with a zero gradient. Targets that are not finite or not positive are invalid;
    whatever stands there never reaches the loss. A prediction that is NaN on a valid pixel stays NaN: it is not hidden.

    Args:
        form: "bts" divides the variance by N, which equals BTS's `mean(g^2) - variance_focus mean(g)^2`; "adabins" divides by
            N - 1 as AdaBins does (and gives variance 0 instead of NaN for a single valid pixel).
        root: take the square root, as both published losses do. False is the advised form: its gradient vanishes at the optimum.
        weight: factor in front; the published losses use 10.
        variance_focus: lambda, in [0, 1]; 0.85 in the published losses.
        max_depth: give it to pass logits z instead of depths: log(max_depth * sigmoid(z)) is then computed in closed form.
        min_depth: depths below it (predictions only) continue the logarithm by its tangent. Unit of the target.

    Shape: prediction and target `(N, 1, H, W)` or any equal shapes; mask boolean, broadcastable to them. Returns a scalar, in
    float32 for half-precision predictions.

    Source: BTS `cleinc/bts`, AdaBins `shariqfarooq123/AdaBins` (published formulas); the stable forms are derived here, except the
    variance by N, which is the reading of `kmbmjn/MDE_Toolbox_Others` (arXiv 2311.03938).
    """

    def __init__(
        self,
        form: Literal["bts", "adabins"] = "bts",
        *,
        root: bool = False,
        weight: float = 1.0,
        variance_focus: float = 0.85,
        max_depth: float | None = None,
        min_depth: float = 1e-3,
    ) -> None:
        super().__init__()
        if form not in ("bts", "adabins"):
            raise ConfigError(f"unknown form {form!r} of SILogLoss", fix='use "bts" or "adabins"')
        if not 0 <= variance_focus <= 1:
            raise ConfigError("variance_focus must lie in [0, 1]", evidence=str(variance_focus))
        if not min_depth > 0 or (max_depth is not None and not max_depth > 0):
            raise ConfigError("depths must be positive", evidence=f"min_depth={min_depth}, max_depth={max_depth}")
        self.form = form
        self.root = root
        self.weight = weight
        self.variance_focus = variance_focus
        self.max_depth = max_depth
        self.min_depth = min_depth

    def forward(self, prediction: Tensor, target: Tensor, mask: Tensor | None = None, interpolate: bool = True) -> Tensor:
        """`interpolate` resizes the prediction (logits or depths, bilinear, corners aligned) to the target, as AdaBins does."""
        if interpolate and prediction.shape[-2:] != target.shape[-2:]:
            prediction = F.interpolate(prediction, target.shape[-2:], mode="bilinear", align_corners=True)
        with torch.autocast(prediction.device.type, enabled=False):
            wide_target = at_least_float32(target)
            valid = torch.isfinite(wide_target) & (wide_target > 0)
            if mask is not None:
                valid = valid & mask.bool()
            gap = self._log_depth(prediction, valid) - torch.where(valid, wide_target, 1.0).log()
            mean, variance = masked_moments(gap, valid, correction=int(self.form == "adabins"))
            squared = variance + (1 - self.variance_focus) * mean.square()
            return self.weight * (safe_sqrt(squared) if self.root else squared)

    def _log_depth(self, prediction: Tensor, valid: Tensor) -> Tensor:
        wide = torch.where(valid, at_least_float32(prediction), 1.0)
        if self.max_depth is None:
            return safe_log(wide, self.min_depth)
        return F.logsigmoid(wide) + math.log(self.max_depth)

    def extra_repr(self) -> str:
        return f"form={self.form!r}, root={self.root}, weight={self.weight}, variance_focus={self.variance_focus}"


class RMSELoss(nn.Module):
    """Root of the mean squared error, with gradient 0 instead of NaN at a perfect fit.

    The errors are scaled by the largest of them first, so squares neither underflow (|error| < 1e-23 in float32) nor overflow.

    Shape: input and target of one shape, any; returns a scalar, in float32 for half-precision input.

    Source: derived here.
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:  # noqa: A002 (torch's own name)
        if input.numel() == 0:
            return input.sum()
        with torch.autocast(input.device.type, enabled=False):
            error = at_least_float32(input) - at_least_float32(target)
            largest = error.detach().abs().amax()
            scale = torch.where((largest > 0) & torch.isfinite(largest), largest, 1.0)
            return scale * safe_sqrt((error / scale).square().mean())


class BinaryLogLoss(nn.Module):
    """Binary cross entropy on logits, by log-sigmoid: -(t log sigmoid(z) + (1 - t) log sigmoid(-z)).

    Finite for every finite logit, and its gradient does not die when the sigmoid saturates. `reduction` over an empty tensor
    gives 0.

    Shape: logits and target of one shape; target in [0, 1]. Returns a scalar, or that shape for "none"; float32 for half precision.

    Source: derived here; equals `nn.BCEWithLogitsLoss`.
    """

    def __init__(self, reduction: Reduction = "mean") -> None:
        super().__init__()
        self.reduction = _known_reduction(reduction)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        with torch.autocast(logits.device.type, enabled=False):
            wide, wanted = at_least_float32(logits), at_least_float32(target.to(logits.dtype))
            return _reduce(-(wanted * F.logsigmoid(wide) + (1 - wanted) * F.logsigmoid(-wide)), self.reduction)


class BinaryFocalLoss(nn.Module):
    """Focal loss on logits: -alpha (1 - p)^gamma log p for the positive class and its mirror for the negative, p = sigmoid(z).

    Every factor is an exponential of a log-sigmoid, so nothing saturates to log(0).

    Args:
        gamma: focusing exponent, >= 0.
        alpha: weight of the positive class in [0, 1], the negative has 1 - alpha; None weighs both with 1.
        reduction: "mean", "sum" or "none".

    Shape: as in `BinaryLogLoss`.

    Source: Lin et al. 2017 (formula); the stable form is derived here.
    """

    def __init__(self, gamma: float = 2.0, alpha: float | None = 0.25, reduction: Reduction = "mean") -> None:
        super().__init__()
        if gamma < 0 or (alpha is not None and not 0 <= alpha <= 1):
            raise ConfigError("gamma must be >= 0 and alpha in [0, 1]", evidence=f"gamma={gamma}, alpha={alpha}")
        self.gamma = gamma
        self.alpha = alpha
        self.reduction = _known_reduction(reduction)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        with torch.autocast(logits.device.type, enabled=False):
            wide, wanted = at_least_float32(logits), at_least_float32(target.to(logits.dtype))
            log_p, log_not_p = F.logsigmoid(wide), F.logsigmoid(-wide)
            positive = wanted * (self.gamma * log_not_p).exp() * log_p
            negative = (1 - wanted) * (self.gamma * log_p).exp() * log_not_p
            if self.alpha is not None:
                positive, negative = self.alpha * positive, (1 - self.alpha) * negative
            return _reduce(-(positive + negative), self.reduction)

    def extra_repr(self) -> str:
        return f"gamma={self.gamma}, alpha={self.alpha}, reduction={self.reduction!r}"


class PoweredLoss(nn.Module):
    """`loss(...) ** exponent` for an exponent in (0, 1] with a finite gradient where the loss is 0, as focal Tversky is at a perfect fit.

    Args:
        loss: returns a loss that is not negative.
        exponent: in (0, 1].

    Shape: takes what `loss` takes and returns its shape.

    Source: derived here.
    """

    def __init__(self, loss: nn.Module, exponent: float) -> None:
        super().__init__()
        if not 0 < exponent <= 1:
            raise ConfigError("exponent must lie in (0, 1]", evidence=str(exponent))
        self.loss = loss
        self.exponent = exponent

    def forward(self, *args: Tensor) -> Tensor:
        return safe_power(self.loss(*args), self.exponent)

    def extra_repr(self) -> str:
        return f"exponent={self.exponent}"


def _known_reduction(reduction: Reduction) -> Reduction:
    if reduction not in ("mean", "sum", "none"):
        raise ConfigError(f"unknown reduction {reduction!r}", fix='use "mean", "sum" or "none"')
    return reduction


def _reduce(loss: Tensor, reduction: Reduction) -> Tensor:
    if reduction == "none":
        return loss
    return loss.sum() / max(loss.numel(), 1) if reduction == "mean" else loss.sum()
