"""Which modules are norms: those of torch, of this library, and layer and RMS norms that other code writes out."""

from __future__ import annotations

__all__ = ["eps_of", "is_norm", "is_written_rms_norm", "written_layer_norm_eps"]

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

_OF_TORCH = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_USUAL_EPS = (1e-5, 1e-6, 1e-12, 1e-8)


def is_norm(module: nn.Module) -> bool:
    """By type, for norms of this library by their mark, else by running it; never by name alone."""
    is_known = isinstance(module, _OF_TORCH) or getattr(type(module), "is_norm", False)
    return is_known or is_written_rms_norm(module) or written_layer_norm_eps(module) is not None


def is_written_rms_norm(module: nn.Module) -> bool:
    """Whether a module of another library (LlamaRMSNorm, T5LayerNorm) computes gamma x / rms(x), gamma as stored: found by running it."""
    weight = module._parameters.get("weight")
    return len(list(module.parameters())) == 1 and _computes(module, lambda x: F.rms_norm(x, x.shape[-1:], weight, eps_of(module)), 1.0)


def written_layer_norm_eps(module: nn.Module) -> float | None:
    """The eps of a module of other code (nanoGPT's LayerNorm) that computes a layer norm of rows with its `weight` and `bias` (or none) as
    stored, None for any other module: found by running it, on rows so small that eps shows."""
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    if isinstance(module, nn.LayerNorm) or any(name not in ("weight", "bias") for name, _ in module.named_parameters()):
        return None
    told = eps_of(module)
    for eps in _USUAL_EPS if told is None else (told,):
        if _computes(module, lambda x, eps=eps: F.layer_norm(x, x.shape[-1:], weight, bias, eps), 3e-3):  # type: ignore[misc]
            return eps
    return None


@torch.no_grad()
def _computes(module: nn.Module, formula: Callable[[torch.Tensor], torch.Tensor], scale: float) -> bool:
    """Whether a module of other code that is called a norm, with a vector `weight` and no parts, gives what the formula gives."""
    weight = module._parameters.get("weight")
    has_parts = any(True for _ in module.children()) or any(True for _ in module.buffers())
    if "Norm" not in type(module).__name__ or type(module).__module__.startswith("torch.") or has_parts or weight is None:
        return False
    if weight.ndim != 1 or weight.is_meta:
        return False
    rows = scale * torch.linspace(-1, 2, 3 * weight.numel(), device=weight.device, dtype=weight.dtype).reshape(3, -1)
    try:
        found = module(rows)
    except (TypeError, RuntimeError):  # it takes something else: a gate, a time, another shape
        return False
    half = weight.dtype in (torch.float16, torch.bfloat16)
    return (
        isinstance(found, torch.Tensor) and found.shape == rows.shape and torch.allclose(found, formula(rows), rtol=2e-2 if half else 1e-4)
    )


def eps_of(module: nn.Module) -> float | None:
    names = ("eps", "variance_epsilon", "epsilon")
    return next((value for name in names if isinstance(value := getattr(module, name, None), (float, int))), None)
