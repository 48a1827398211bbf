"""The fix: put stable losses where known unsafe loss modules stand."""

from __future__ import annotations

__all__ = ["replace_unsafe_losses"]

import copy
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from pl_normkit.errors import NothingMatchedError
from pl_normkit.methods.nan_safety.modules import BinaryFocalLoss, BinaryLogLoss, PoweredLoss, RMSELoss, SILogLoss
from pl_normkit.surgery import Change, Changes, Replace, apply_edits
from pl_normkit.wrappers import unwrapped

Build = Callable[[nn.Module], nn.Module | None]
"""From a loss to its stable form; None where it needs none."""


def _bts(old: nn.Module) -> nn.Module:
    return SILogLoss("bts", root=True, weight=10.0, variance_focus=float(getattr(old, "variance_focus", 0.85)))


def _adabins(old: nn.Module) -> nn.Module:
    return SILogLoss("adabins", root=True, weight=10.0, variance_focus=1 - float(getattr(old, "beta", 0.15)))


def _rmse(old: nn.Module) -> nn.Module:
    return RMSELoss()


def _tversky(old: nn.Module) -> nn.Module | None:
    """Of segmentation_models_pytorch: (1 - index) ** gamma, whose gradient is infinite at a perfect fit for gamma < 1."""
    gamma = float(getattr(old, "gamma", 1.0))
    if not 0 < gamma < 1:
        return None
    plain: Any = copy.deepcopy(old)
    plain.gamma = 1.0
    return PoweredLoss(plain, gamma)


def _focal(old: nn.Module) -> nn.Module | None:
    """Of segmentation_models_pytorch: (1 - p) ** gamma in front of each log-probability, with the same hole for gamma < 1."""
    settings: Mapping[str, Any] = getattr(getattr(old, "focal_loss_fn", None), "keywords", {})
    gamma = float(settings.get("gamma", 2.0))
    if not 0 < gamma < 1 or settings.get("normalized") or settings.get("reduced_threshold") is not None:
        return None
    new: Any = copy.deepcopy(old)
    new.focal_loss_fn = BinaryFocalLoss(gamma, settings.get("alpha"), settings.get("reduction", "mean"))
    return cast(nn.Module, new)


# Class names of public repositories. A name alone proves nothing: the swap is made only where both modules agree on sample arguments.
KNOWN: Mapping[str, Build] = {
    "silog_loss": _bts,
    "SILogLoss": _adabins,
    "RMSELoss": _rmse,
    "RMSE": _rmse,
    "TverskyLoss": _tversky,
    "FocalLoss": _focal,
}
STABLE = (SILogLoss, RMSELoss, BinaryLogLoss, BinaryFocalLoss, PoweredLoss)


def replace_unsafe_losses(module: nn.Module, known: Mapping[type[nn.Module], Build] | None = None) -> Changes:
    """Swap loss modules that can give NaN for stable ones with the same values.

    A candidate (by class name: BTS `silog_loss`, AdaBins `SILogLoss`, any `RMSELoss`, segmentation_models_pytorch's `TverskyLoss` and
    `FocalLoss` with gamma below 1) is swapped only where old and new agree to 1e-6 (relative) on generated depths in [0.5, 80], or on
    logits and labels; one that does not agree is left alone and listed under `skipped`.

    Args:
        module: the model or LightningModule that holds the losses as submodules.
        known: your own classes with a function from the old module to the new; these are taken at your word, without the comparison.

    Raises:
        NothingMatchedError: there is no loss to swap and no stable one either.

    >>> from torch import nn
    >>> from pl_normkit import replace_unsafe_losses
    >>> class RMSE(nn.Module):
    ...     def forward(self, prediction, target):
    ...         return nn.functional.mse_loss(prediction, target).sqrt()
    >>> model = nn.ModuleDict({"head": nn.Linear(4, 1), "loss": RMSE()})
    >>> replace_unsafe_losses(model).made[0].what
    'RMSE -> RMSELoss()'
    """
    module = unwrapped(module)
    edits, skipped, stable = [], [], False
    for path, found in module.named_modules():
        stable = stable or isinstance(found, STABLE)
        if not path or isinstance(found, STABLE):
            continue
        build = _builder_of(found, known or {})
        new = build(found) if build is not None else None
        if new is None:
            continue
        if type(found) not in (known or {}) and not _agree(found, new):
            skipped.append(Change(path, f"{type(found).__name__} gives other values than {new}"))
            continue
        edits.append(Replace(path, new, f"{type(found).__name__} -> {new}"))
    if not edits and not skipped and not stable:
        raise NothingMatchedError(
            "no known unsafe loss module is in the model",
            fix="hold the loss as a submodule, or pass known={YourLoss: lambda old: SILogLoss(...)}",
        )
    return apply_edits(module, edits, skipped)


def _builder_of(found: nn.Module, known: Mapping[type[nn.Module], Build]) -> Build | None:
    return known.get(type(found)) or KNOWN.get(type(found).__name__)


def _agree(old: nn.Module, new: nn.Module) -> bool:
    """Same loss on seeded arguments: a pair of depth maps with or without a mask, or logits with labels."""
    generator = torch.Generator().manual_seed(0)
    prediction, target = (0.5 + 79.5 * torch.rand(2, 1, 6, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = target > 20
    if isinstance(new, SILogLoss):
        return _same_value(old, new, (prediction, target, mask))
    if isinstance(new, RMSELoss):
        return _same_value(old, new, (prediction, target))
    logits = torch.randn(2, 3, 6, 8, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 3, (2, 6, 8), generator=generator)
    several = (logits > 0).to(logits.dtype)
    return any(_same_value(old, new, arguments) for arguments in ((logits, labels), (logits, several), (logits[:, :1], several[:, :1])))


def _same_value(old: nn.Module, new: nn.Module, arguments: tuple[Tensor, ...]) -> bool:
    try:
        expected, actual = old(*arguments), new(*arguments)
    except Exception:  # another signature: not the loss that the name promised
        return False
    return isinstance(expected, Tensor) and torch.allclose(expected, actual.to(expected.dtype), rtol=1e-6, atol=1e-7)
