"""Modules that torch puts around a model, and what they do to names."""

from __future__ import annotations

__all__ = ["unwrapped", "unwrapped_name"]

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

_IN_NAMES = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")


def unwrapped(model: nn.Module) -> nn.Module:
    """The module under `torch.compile`, DistributedDataParallel and DataParallel: its paths are those the user knows."""
    while True:
        if isinstance(model, (DataParallel, DistributedDataParallel)):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def unwrapped_name(name: str) -> str:
    """A module or parameter name without the parts that FSDP, activation checkpointing and torch.compile put in."""
    for wrapper in _IN_NAMES:
        name = name.replace(wrapper, "")
    return name
