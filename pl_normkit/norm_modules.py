"""Which modules are norms: those of torch, of this library, and RMS norms that other libraries write out."""

from __future__ import annotations

__all__ = ["eps_of", "is_norm", "is_written_rms_norm"]

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

_OF_TORCH = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def is_norm(module: nn.Module) -> bool:
    """By type, for norms of this library by their mark, else by running it; never by name alone."""
    return isinstance(module, _OF_TORCH) or getattr(type(module), "is_norm", False) or is_written_rms_norm(module)


@torch.no_grad()
def is_written_rms_norm(module: nn.Module) -> bool:
    """Whether a module of another library (LlamaRMSNorm, T5LayerNorm) computes gamma x / rms(x), gamma as stored: found by running it."""
    weight = module._parameters.get("weight")
    has_more = len(list(module.parameters())) != 1 or any(True for _ in module.children()) or any(True for _ in module.buffers())
    if "Norm" not in type(module).__name__ or type(module).__module__.startswith("torch.") or has_more or weight is None:
        return False
    if weight.ndim != 1 or weight.is_meta:
        return False
    rows = torch.linspace(-1, 2, 3 * weight.numel(), device=weight.device, dtype=weight.dtype).reshape(3, -1)
    try:
        found = module(rows)
    except (TypeError, RuntimeError):  # it takes something else: a gate, a time, another shape
        return False
    expected = nn.functional.rms_norm(rows, weight.shape, weight, eps_of(module))
    half = weight.dtype in (torch.float16, torch.bfloat16)
    return isinstance(found, torch.Tensor) and found.shape == rows.shape and torch.allclose(found, expected, rtol=2e-2 if half else 1e-4)


def eps_of(module: nn.Module) -> float | None:
    names = ("eps", "variance_epsilon", "epsilon")
    return next((value for name in names if isinstance(value := getattr(module, name, None), (float, int))), None)
