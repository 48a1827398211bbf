"""The probe: what dropout does to the variance that each norm sees."""

from __future__ import annotations

__all__ = ["equal_strength", "measure_variance_shift"]

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils._pytree import tree_map_only

from pl_normkit.graph import call_arguments
from pl_normkit.preserve import preserved

_CHANNEL_FIRST = (_BatchNorm, _InstanceNorm, nn.GroupNorm)
_CHANNEL_LAST = (nn.LayerNorm, nn.RMSNorm)


@torch.no_grad()
def measure_variance_shift(model: nn.Module, batch: Any) -> dict[str, float]:
    """Variance of each norm's input in eval over train mode, by module path; 1 means dropout shifts nothing.

    The variance is taken per feature over the batch (and positions), biased, and averaged over features, as in the
    authors' scripts (repository kmbmjn/DropoutCorrectly). Batch norms use batch statistics in both passes, so that the
    ratio shows dropout alone and does not depend on how far training has come; that choice is ours. Everything the
    passes touch (running statistics, modes, RNG) is restored.

    Args:
        model: a model with real weights.
        batch: inputs of the model, at least two samples: a tensor, a tuple of positional or a dict of keyword arguments.

    Returns:
        ratio per norm module that ran; norms whose train-mode input is constant are left out.

    Raises:
        ValueError: from torch, when a batch norm sees one value per channel.

    >>> import torch
    >>> from torch import nn
    >>> from pl_normkit import measure_variance_shift
    >>> model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(8))
    >>> shift = measure_variance_shift(model, torch.randn(4096, 8))
    >>> 0.4 < shift["1"] < 0.6
    True
    """
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.to(device), call_arguments(batch))
    with preserved(model, buffers=True):
        model.train()
        train = _input_variances(model, args, kwargs)
        model.eval()
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.train()
        evaluation = _input_variances(model, args, kwargs)
    return {path: evaluation[path] / variance for path, variance in train.items() if variance > 0 and path in evaluation}


def equal_strength(p: float, maps: Tensor) -> float:
    """The p of an element-wise dropout in front of global average pooling that is as strong as dropout `p` behind it.

    Behind the pool the noise of a channel has variance p/(1-p) g^2, with g its mean over N positions; in front of it p/(1-p) mean(x^2)/N.
    Both are summed over samples and channels and set equal (derived here).

    Args:
        p: the drop probability behind the pool, in [0, 1).
        maps: what is pooled, (samples, channels, *positions), in eval mode.

    Returns:
        a probability in [0, 1); `p` itself where nothing can be said, since all maps are zero or one position is averaged.

    >>> import torch
    >>> round(equal_strength(0.5, torch.ones(2, 3, 4, 4)), 4)  # odds 1 times 16 positions
    0.9412
    """
    positions = maps.double().flatten(2)
    square_of_mean, mean_of_square = float(positions.mean(2).square().sum()), float(positions.square().mean(2).sum())
    if mean_of_square == 0.0 or positions.shape[2] == 1:
        return p
    odds = p / (1 - p) * positions.shape[2] * square_of_mean / mean_of_square
    return odds / (1 + odds)


def _input_variances(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, float]:
    seen: dict[str, list[Tensor]] = defaultdict(list)
    handles = [
        module.register_forward_pre_hook(_record(seen[path], isinstance(module, _CHANNEL_LAST)))
        for path, module in model.named_modules()
        if isinstance(module, (*_CHANNEL_FIRST, *_CHANNEL_LAST))
    ]
    try:
        model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return {path: float(torch.stack(variances).mean()) for path, variances in seen.items() if variances}


def _record(variances: list[Tensor], channel_last: bool) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def hook(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        features: Tensor = arguments[0].double()
        by_feature = features.flatten(0, -2) if channel_last else features.transpose(0, 1).flatten(1).T
        variances.append(by_feature.var(0, correction=0).mean())

    return hook
