"""The fix: put stable losses where known unsafe loss modules stand."""

from __future__ import annotations

__all__ = ["replace_unsafe_losses"]

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from pl_normkit.errors import NothingMatchedError
from pl_normkit.methods.nan_safety.modules import BinaryFocalLoss, BinaryLogLoss, RMSELoss, SILogLoss
from pl_normkit.surgery import Change, Changes, Replace, apply_edits
from pl_normkit.wrappers import unwrapped

Build = Callable[[nn.Module], nn.Module]


def _bts(old: nn.Module) -> nn.Module:
    return SILogLoss("bts", root=True, weight=10.0, variance_focus=float(getattr(old, "variance_focus", 0.85)))


def _adabins(old: nn.Module) -> nn.Module:
    return SILogLoss("adabins", root=True, weight=10.0, variance_focus=1 - float(getattr(old, "beta", 0.15)))


def _rmse(old: nn.Module) -> nn.Module:
    return RMSELoss()


# Class names of public repositories. A name alone proves nothing: the swap is made only where both modules agree on sample depths.
KNOWN: Mapping[str, Build] = {"silog_loss": _bts, "SILogLoss": _adabins, "RMSELoss": _rmse, "RMSE": _rmse}
STABLE = (SILogLoss, RMSELoss, BinaryLogLoss, BinaryFocalLoss)


def replace_unsafe_losses(module: nn.Module, known: Mapping[type[nn.Module], Build] | None = None) -> Changes:
    """Swap loss modules that can give NaN for stable ones with the same values.

    A candidate (by class name: BTS `silog_loss`, AdaBins `SILogLoss`, any `RMSELoss`) is swapped only where old and new agree to
    1e-6 (relative) on generated depths in [0.5, 80]; one that does not agree is left alone and listed under `skipped`.

    Args:
        module: the model or LightningModule that holds the losses as submodules.
        known: your own classes with a function from the old module to the new; these are taken at your word, without the comparison.

    Raises:
        NothingMatchedError: there is no loss to swap and no stable one either.
    """
    module = unwrapped(module)
    edits, skipped, stable = [], [], False
    for path, found in module.named_modules():
        stable = stable or isinstance(found, STABLE)
        if not path or isinstance(found, STABLE):
            continue
        build = _builder_of(found, known or {})
        if build is None:
            continue
        new = build(found)
        if type(found) not in (known or {}) and not _agree(found, new):
            skipped.append(Change(path, f"{type(found).__name__} gives other values than {new}"))
            continue
        edits.append(Replace(path, new, f"{type(found).__name__} -> {new}"))
    if not edits and not skipped and not stable:
        raise NothingMatchedError(
            "no known unsafe loss module is in the model",
            mend="hold the loss as a submodule, or pass known={YourLoss: lambda old: SILogLoss(...)}",
        )
    return apply_edits(module, edits, skipped)


def _builder_of(found: nn.Module, known: Mapping[type[nn.Module], Build]) -> Build | None:
    return known.get(type(found)) or KNOWN.get(type(found).__name__)


def _agree(old: nn.Module, new: nn.Module) -> bool:
    """Same loss on a seeded pair of depth maps, (2, 1, 6, 8), with the call (prediction, target) or (prediction, target, mask)."""
    generator = torch.Generator().manual_seed(0)
    prediction, target = (0.5 + 79.5 * torch.rand(2, 1, 6, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = target > 20
    if isinstance(new, RMSELoss):
        return _same_value(old, new, (prediction, target))
    return _same_value(old, new, (prediction, target, mask))


def _same_value(old: nn.Module, new: nn.Module, arguments: tuple[Tensor, ...]) -> bool:
    try:
        expected, actual = old(*arguments), new(*arguments)
    except Exception:  # another signature: not the loss that the name promised
        return False
    return isinstance(expected, Tensor) and torch.allclose(expected, actual.to(expected.dtype), rtol=1e-6, atol=1e-7)
