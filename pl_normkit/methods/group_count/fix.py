"""Batch norms to group norms and back: affine parameters stay the same objects, running statistics go or start anew."""

from __future__ import annotations

__all__ = ["StandardizedConv", "convert_small_batches", "convert_to_batch_norm", "convert_to_group_norm"]

import importlib
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase
from torch.nn.modules.conv import _ConvNd

from pl_normkit.errors import NothingMatchedError
from pl_normkit.methods.group_count.counts import GroupTarget, num_groups
from pl_normkit.surgery import Change, Changes, Edit, Filter, MixIn, Replace, apply_edits
from pl_normkit.wrappers import unwrapped

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_BATCH_NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


class StandardizedConv(_ConvNd):
    """Mix-in for convolutions: the kernel of each output channel has zero mean and unit variance when it is used; the parameter stays raw.

    Formula: (w - mean) / sqrt(variance + 1e-6) over all but the output channels, as in timm's `StdConv2d`.
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: A002 - torch's name
        flat = weight.reshape(1, weight.shape[0], -1)
        standardized = F.batch_norm(flat, None, None, training=True, momentum=0.0, eps=1e-6).reshape_as(weight)
        return super()._conv_forward(input, standardized, bias)


def convert_to_group_norm(
    model: nn.Module, groups: GroupTarget = "32 groups", *, weight_standardization: bool = False, filter_fn: Filter | None = None
) -> Changes:
    """Replace batch norms by group norms, which read one sample at a time and so do not mind small batches.

    Scale and shift stay the same parameter objects; running statistics are dropped, so their state_dict keys go. The function changes:
    convert before training, or train on. timm's batch norms with an activation become timm's group norms with the same activation.

    Args:
        model: edited in place.
        groups: as for `num_groups`, rounded to a divisor of each norm's channels.
        weight_standardization: also standardize the kernels of the convolutions beside the converted norms, as timm's `StdConv2d` does;
            keys and parameters stay.
        filter_fn: called with (batch norm, path), says whether to convert it.

    Returns:
        what was converted; `skipped` lists the batch norms that were left alone, and why.

    Raises:
        NothingMatchedError: when there is no batch norm to convert.
        ConfigError: for a bad target. The model is untouched in each case.

    Source: group norm: Wu and He, "Group Normalization", arXiv 1803.08494; which number of groups is yours to choose.

    >>> model = nn.Sequential(nn.Conv2d(3, 48, 3), nn.BatchNorm2d(48), nn.ReLU())
    >>> changes = convert_to_group_norm(model)
    >>> type(model[1]).__name__, model[1].num_groups
    ('GroupNorm', 24)
    """
    model = unwrapped(model)
    edits: list[Edit] = []
    skipped: list[Change] = []
    for path, module in model.named_modules():
        if not isinstance(module, _BatchNorm):
            continue
        if filter_fn is not None and not filter_fn(module, path):
            skipped.append(Change(path, "not chosen by the filter"))
        elif (reason := _why_not(module)) or not path:
            skipped.append(Change(path, reason or "the model itself cannot be replaced"))
        else:
            new = _group_norm(module, num_groups(module.num_features, groups))
            edits.append(Replace(path, new, f"group norm of {new.num_groups} groups in place of batch norm", STATISTICS))
    if not edits:
        raise NothingMatchedError("there is no batch norm to convert", evidence="; ".join(map(str, skipped)))
    if weight_standardization:
        edits += _standardized(model, skipped)
    return apply_edits(model, edits, skipped)


def convert_small_batches(model: nn.Module, example_inputs: Any, *, filter_fn: Filter | None = None) -> Changes:
    """`convert_to_group_norm` with its defaults, as the fix of NK811."""
    return convert_to_group_norm(model, filter_fn=filter_fn)


def convert_to_batch_norm(model: nn.Module, *, dimensions: int = 4, filter_fn: Filter | None = None) -> Changes:
    """Replace group norms by batch norms: the way back, with statistics that start anew (mean 0, variance 1).

    Args:
        model: edited in place.
        dimensions: of the norms' inputs: 4 for images (N, C, H, W), 5 for volumes, 2 or 3 for vectors and sequences.
        filter_fn: called with (group norm, path), says whether to convert it.

    Raises:
        NothingMatchedError: when there is no group norm to convert; the model is untouched.

    >>> model = nn.Sequential(nn.Conv2d(3, 48, 3), nn.GroupNorm(24, 48))
    >>> changes = convert_to_batch_norm(model)
    >>> type(model[1]).__name__
    'BatchNorm2d'
    """
    model = unwrapped(model)
    chosen = {
        path: module
        for path, module in model.named_modules()
        if path and type(module) is nn.GroupNorm and (filter_fn is None or filter_fn(module, path))
    }
    if not chosen:
        raise NothingMatchedError("there is no group norm to convert")
    what = "batch norm in place of group norm"
    return apply_edits(model, [Replace(path, _batch_norm(module, dimensions), what, STATISTICS) for path, module in chosen.items()])


def _why_not(module: _BatchNorm) -> str:
    if isinstance(module, _LazyNormBase):
        return "a lazy batch norm has no channels yet: run the model once"
    if type(module).__module__.startswith("timm."):
        return "" if hasattr(module, "act") and hasattr(module, "drop") else f"{type(module).__name__} does more than a batch norm"
    if type(module) not in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm):
        return f"{type(module).__name__} may do more than a batch norm"
    return ""


def _group_norm(old: _BatchNorm, groups: int) -> nn.GroupNorm:
    where = {"device": old.weight.device, "dtype": old.weight.dtype} if old.affine else {}
    if type(old).__module__.startswith("timm."):
        new: nn.GroupNorm = importlib.import_module("timm.layers").GroupNormAct(old.num_features, groups, eps=old.eps, affine=old.affine)
        new.drop, new.act = old.drop, old.act
    else:
        new = nn.GroupNorm(groups, old.num_features, eps=old.eps, affine=old.affine, **where)  # type: ignore[arg-type]
    new.weight, new.bias = old.weight, old.bias
    return new


def _batch_norm(old: nn.GroupNorm, dimensions: int) -> _BatchNorm:
    where = {"device": old.weight.device, "dtype": old.weight.dtype} if old.affine else {}
    new = _BATCH_NORMS[dimensions](old.num_channels, eps=old.eps, affine=old.affine, **where)  # type: ignore[arg-type]
    new.weight, new.bias = old.weight, old.bias
    return new


def _standardized(model: nn.Module, skipped: list[Change]) -> list[Edit]:
    edits: list[Edit] = []
    for path, module in model.named_modules():
        if not isinstance(module, _ConvNd) or module.transposed:
            continue
        if type(module).forward not in (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward):
            skipped.append(Change(path, f"the kernel is not standardized: {type(module).__name__} has a forward of its own"))
        elif module.weight[0].numel() > 1:
            edits.append(MixIn(path, StandardizedConv, "standardized kernel"))
    return edits
