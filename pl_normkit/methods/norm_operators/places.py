"""Which modules an operator can replace: row norms, batch norms, convolutions."""

from __future__ import annotations

__all__ = ["batch_norms", "is_plain_row_norm", "is_with_activation", "old_norm", "row_norms", "why_hooked", "why_no_batch_norm"]

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import nn

from pl_normkit.graph import ModelGraph
from pl_normkit.methods.norm_operators.operators import OldNorm, Place
from pl_normkit.norm_modules import eps_of, is_written_rms_norm, written_layer_norm_eps

_CHANNELS_FIRST = frozenset(
    (("timm.layers.norm", "LayerNorm2d"), ("timm.layers.norm", "RmsNorm2d"), ("torchvision.models.convnext", "LayerNorm2d"))
)
"""Layer norms over the second dimension, by module and class."""
_ROWS = frozenset((("timm.layers.norm", "LayerNorm"), ("timm.layers.norm", "RmsNorm")))
_BATCH = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def row_norms(model: nn.Module, graph: ModelGraph | None) -> Iterator[Place]:
    """Layer norms and RMS norms of torch, of libraries and written by hand, over the last dimension or the channels of images."""
    for path, module in model.named_modules():
        if isinstance(module, (nn.LayerNorm, nn.RMSNorm)) or _name_of(module) in _ROWS | _CHANNELS_FIRST:
            yield Place(path, _why_no_rows(module, path))
        elif is_written_rms_norm(module) or written_layer_norm_eps(module) is not None:
            yield Place(path, why_hooked(module, path))
        elif _is_unknown(module):
            formula = "gamma x / rms(x) with gamma as it is stored" if "RMS" in type(module).__name__ else "a layer norm of rows as stored"
            is_meta = any(parameter.is_meta for parameter in module.parameters())
            why = "cannot be run on the meta device, to see what it computes" if is_meta else f"does not compute {formula}"
            yield Place(path, f"{type(module).__name__} {why}")


def batch_norms(model: nn.Module, graph: ModelGraph | None) -> Iterator[Place]:
    """Batch norms of torch."""
    for path, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            yield Place(path, why_no_batch_norm(module, path))


def why_no_batch_norm(module: nn.Module, path: str) -> str:
    if type(module) not in _BATCH:
        return f"{type(module).__name__} may do more than a norm"
    return why_hooked(module, path)


def is_plain_row_norm(module: nn.Module) -> bool:
    """Whether it is torch's layer norm or RMS norm, or timm's over the last dimension, and no subclass."""
    return type(module) in (nn.LayerNorm, nn.RMSNorm) or _name_of(module) in _ROWS


def is_with_activation(module: nn.Module) -> bool:
    """Whether it is timm's batch norm with dropout and activation in one module."""
    return _name_of(module) == ("timm.layers.norm_act", "BatchNormAct2d")


def why_hooked(module: nn.Module, path: str) -> str:
    """Why a module whose kind is right cannot be replaced, "" where it can."""
    if module._forward_hooks or module._forward_pre_hooks:
        return "it has hooks"
    return "" if path else "the model itself cannot be replaced"


def _is_unknown(module: nn.Module) -> bool:
    """Whether a module of another library is called a layer or RMS norm, and is none that is known (Gemma's)."""
    weight, name = module._parameters.get("weight"), type(module).__name__
    is_called = "RMSNorm" in name or "LayerNorm" in name
    return weight is not None and weight.ndim == 1 and is_called and not getattr(type(module), "is_norm", False)


def _name_of(module: nn.Module) -> tuple[str, str]:
    return type(module).__module__, type(module).__name__


def _why_no_rows(module: nn.Module, path: str) -> str:
    if not is_plain_row_norm(module) and _name_of(module) not in _CHANNELS_FIRST:
        return f"{type(module).__name__} may do more than a norm"
    if len(module.normalized_shape) != 1:  # type: ignore[arg-type]
        return "it normalizes several dimensions"
    return why_hooked(module, path)


def old_norm(module: nn.Module) -> OldNorm:
    """What there is to take over from a norm or a convolution."""
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    like = next((tensor for tensor in (*module.parameters(), *module.buffers()) if tensor.is_floating_point()), torch.empty(0))
    layer_eps = written_layer_norm_eps(module)
    eps = eps_of(module) if layer_eps is None else layer_eps
    eps = float(torch.finfo(like.dtype).eps if eps is None else eps)
    is_written = layer_eps is not None or is_written_rms_norm(module)
    is_row = is_written or isinstance(module, (nn.LayerNorm, nn.RMSNorm)) or _name_of(module) in _ROWS | _CHANNELS_FIRST
    axis: Literal[-1, 1] = -1 if is_row and _name_of(module) not in _CHANNELS_FIRST else 1
    centred = not is_row or layer_eps is not None or isinstance(module, nn.LayerNorm)
    names = ("normalized_shape", "num_features", "out_channels", "out_features")
    width: Any = like.shape if is_written else next(getattr(module, name) for name in names if hasattr(module, name))
    return OldNorm(int(width[0] if is_row else width), eps, weight, bias, like.device, like.dtype, axis, centred, module)
