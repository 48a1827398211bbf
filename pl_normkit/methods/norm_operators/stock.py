"""`to_stock_norms`: norms with a constant std as norms of torch, so that stock model classes load them."""

from __future__ import annotations

__all__ = ["to_stock_norms"]

import torch
from torch import nn

from pl_normkit.errors import EditError, NothingMatchedError
from pl_normkit.methods.norm_operators.operators.fixed_std import FixedStdNorm
from pl_normkit.methods.norm_operators.weights import refuse_sharded
from pl_normkit.surgery import Change, Changes, Edit, Replace, apply_edits
from pl_normkit.wrappers import unwrapped

EPS = 1e12
"""Beside which the variance of any row is nothing: the norm divides by 1e6."""


def to_stock_norms(model: nn.Module) -> Changes:
    """Turn the norms of `swap_norms(model, to="fixed_std")` that have switched into torch's own: eps 1e12 and gamma * 1e6 / std.

    Such a norm divides each row by sqrt(variance + 1e12), which is 1e6 for all of them, so that it is the constant factor gamma / std. Its
    keys are those of a layer or RMS norm, so the checkpoint loads into the model's original class once its eps is set to 1e12 there. For
    inference: gamma is too large to be trained on. Keep the norms out of float16, in which it overflows; in bfloat16 it is as exact as
    bfloat16 is. NK921 (preview) fires on these norms, which is what it is for.

    Args:
        model: edited in place.

    Returns:
        what was done, with `undo()`; `skipped` names norms left alone, and why.

    Raises:
        NothingMatchedError: when no norm can be turned; its evidence lists the reasons.
        EditError: for float16, for values that overflow, and for sharded weights or those on the meta device. The model is untouched then.

    Source: "Transformers Don't Need LayerNorm at Inference Time", arXiv 2507.02559, whose code exports so. That float16 cannot hold it is
    derived here: tests/methods/norm_operators/test_stock.py.

    >>> from pl_normkit import swap_norms
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8))
    >>> changes = swap_norms(model, to="fixed_std")
    >>> _ = model(torch.randn(5, 4)), model[1].share.zero_()  # what NormSchedule does over training
    >>> print(to_stock_norms(model))
    1: layer norm with eps 1e12, which divides by a constant
    """
    model = unwrapped(model)
    refuse_sharded(model)
    edits: list[Edit] = []
    skipped: list[Change] = []
    for path, norm in model.named_modules():
        if not isinstance(norm, FixedStdNorm):
            continue
        if why := _why_not(norm):
            skipped.append(Change(path, why))
        else:
            what = f"{'layer' if norm.centred else 'RMS'} norm with eps 1e12, which divides by a constant"
            edits.append(Replace(path, _stock(norm, path), what, may_differ=("std", "share")))
    if not edits:
        raise NothingMatchedError("no norm with a constant std", evidence="; ".join(map(str, skipped)), fix="swap to fixed_std, and train")
    return apply_edits(model, edits, skipped)


def _why_not(norm: FixedStdNorm) -> str:
    if float(norm.share) > 0:
        return "it has not switched to its constant"
    if float(norm.std) == 0:
        return "it has seen no batch in training mode"
    if norm.axis != -1:
        return "no norm of torch works on channels in front"
    if norm.weight is None:
        return "it has no scale that could take the constant in"
    return "an RMS norm of torch has no shift" if not norm.centred and norm.bias is not None else ""


@torch.no_grad()
def _stock(norm: FixedStdNorm, path: str) -> nn.Module:
    gamma = norm.weight
    assert gamma is not None  # else it is skipped
    if gamma.dtype == torch.float16:
        raise EditError("gamma * 1e6 / std overflows in float16", where=path, fix="convert in float32 or bfloat16")
    new: nn.LayerNorm | nn.RMSNorm
    if norm.centred:
        new = nn.LayerNorm(norm.width, EPS, bias=norm.bias is not None, device=gamma.device, dtype=gamma.dtype)
    else:
        new = nn.RMSNorm(norm.width, EPS, device=gamma.device, dtype=gamma.dtype)
    assert new.weight is not None
    new.weight.copy_(gamma.double() * EPS**0.5 / norm.std.double())
    if not bool(new.weight.isfinite().all()):
        raise EditError("gamma * 1e6 / std overflows", where=path, evidence=f"std {float(norm.std):g}")
    if isinstance(new, nn.LayerNorm) and norm.bias is not None:
        new.bias.copy_(norm.bias)
    return new
