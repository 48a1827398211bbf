"""`swap_norms`: other norms in place of layer norms and RMS norms, before training."""

from __future__ import annotations

__all__ = ["swap_norms"]

from typing import Any

import torch
from torch import nn

from pl_normkit.errors import ConfigError, NothingMatchedError, nearest
from pl_normkit.methods.norm_operators.operators import OldNorm, operators
from pl_normkit.surgery import Change, Changes, Edit, Filter, Replace, apply_edits
from pl_normkit.wrappers import unwrapped


def swap_norms(model: nn.Module, to: str, *, where: Filter | None = None, **options: Any) -> Changes:
    """Replace `nn.LayerNorm` and `nn.RMSNorm` over the last dimension by another norm. The function changes: swap before training.

    Scale and shift stay the same parameter objects where the new norm has their like (a trained scale is not lost), and eps is
    carried over. To turn a trained model's layer norms into RMS norms without changing its function, use `to_rmsnorm`.

    Args:
        model: edited in place.
        to: "rmsnorm", "dyt" or "scalenorm"; each file in `norm_operators/operators` adds one, with formula, source and defaults.
        where: called with (norm, path), says whether to replace it.
        options: of the new norm: `alpha` of "dyt" (0.5), `eps` of "scalenorm" (1e-5).

    Returns:
        what was replaced; `skipped` lists norms left alone, and why: subclasses with a forward of their own, several dimensions.

    Raises:
        ConfigError: for an operator or an option that does not exist.
        NothingMatchedError: when no norm can be replaced. The model is untouched in each case.

    Source: each operator names its own.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8))
    >>> print(swap_norms(model, to="dyt", alpha=1.0))
    1: dyt in place of LayerNorm
    """
    operator = operators().get(to)
    if operator is None:
        raise ConfigError(f"there is no norm {to!r}", fix=nearest(to, operators()) or f"one of {', '.join(sorted(operators()))}")
    for name in options:
        if name not in operator.options:
            raise ConfigError(f"{to} has no option {name!r}", fix=f"it has {', '.join(operator.options) or 'none'}")
    model = unwrapped(model)
    edits: list[Edit] = []
    skipped: list[Change] = []
    for path, module in model.named_modules():
        if not isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
            continue
        reason = "not chosen" if where is not None and not where(module, path) else _why_not(module, path)
        if reason:
            skipped.append(Change(path, reason))
            continue
        new = operator.make(_old_norm(module), {**operator.options, **options})
        edits.append(Replace(path, new, f"{to} in place of {type(module).__name__}", operator.drops))
    if not edits:
        raise NothingMatchedError("no layer norm or RMS norm can be replaced", evidence="; ".join(map(str, skipped)))
    return apply_edits(model, edits, skipped)


def _why_not(module: nn.LayerNorm | nn.RMSNorm, path: str) -> str:
    if type(module) not in (nn.LayerNorm, nn.RMSNorm) and type(module).__module__ != "timm.layers.norm":
        return f"{type(module).__name__} may do more than a norm"
    if type(module).__name__ not in ("LayerNorm", "RMSNorm"):
        return f"{type(module).__name__} normalizes another dimension or does more"
    if len(module.normalized_shape) != 1:
        return "it normalizes several dimensions"
    return "" if path else "the model itself cannot be replaced"


def _old_norm(module: nn.LayerNorm | nn.RMSNorm) -> OldNorm:
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    like = weight if weight is not None else torch.empty(0)
    eps = module.eps if module.eps is not None else torch.finfo(like.dtype).eps
    return OldNorm(module.normalized_shape[0], eps, weight, bias, like.device, like.dtype)
