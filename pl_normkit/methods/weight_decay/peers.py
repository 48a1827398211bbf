"""Which parameters other libraries decay: their rules by dimensions, names and module types, which need no graph."""

from __future__ import annotations

__all__ = ["PEERS", "decayed_by_peers"]

import fnmatch
import re
from collections.abc import Callable, Iterator, Mapping

from torch import Tensor, nn

from pl_normkit.methods.weight_decay.module_types import owners

_TRANSFORMERS_PATTERN = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")


def decayed_by_peers(model: nn.Module) -> dict[str, frozenset[str]]:
    """Rule of `PEERS` -> names of the parameters that it decays."""
    parameters = dict(model.named_parameters())
    return {name: frozenset(decayed(model, parameters)) for name, (decayed, _) in PEERS.items()}


def _by_ndim(_: nn.Module, parameters: Mapping[str, Tensor]) -> Iterator[str]:
    return (name for name, parameter in parameters.items() if parameter.ndim >= 2)


def _by_timm(model: nn.Module, parameters: Mapping[str, Tensor]) -> Iterator[str]:
    spared = list(_no_weight_decay(model, ""))
    for name, parameter in parameters.items():
        if parameter.ndim > 1 and not name.endswith(".bias") and not any(fnmatch.fnmatch(name, pattern) for pattern in spared):
            yield name


def _no_weight_decay(module: nn.Module, prefix: str) -> Iterator[str]:
    """The names that `no_weight_decay()` of the outermost modules with such a method lists; timm asks the model alone."""
    listed = getattr(module, "no_weight_decay", None)
    if callable(listed):
        yield from (f"{prefix}{name}" for name in listed())
        return
    for name, child in module.named_children():
        yield from _no_weight_decay(child, f"{prefix}{name}.")


def _by_transformers(model: nn.Module, parameters: Mapping[str, Tensor]) -> Iterator[str]:
    holders = owners(model)
    for name in parameters:
        holder, _ = holders[name]
        in_layer_norm = isinstance(holder, nn.LayerNorm) and holder is not model
        if not in_layer_norm and not _TRANSFORMERS_PATTERN.search(name.lower()):
            yield name


PEERS: dict[str, tuple[Callable[[nn.Module, Mapping[str, Tensor]], Iterator[str]], str]] = {
    "timm": (_by_timm, "timm.optim.param_groups_weight_decay with the model's no_weight_decay() list"),
    "transformers": (_by_transformers, "Trainer.get_decay_parameter_names of transformers"),
    "ndim": (_by_ndim, "two dimensions or more, as in nanoGPT's configure_optimizers"),
}
"""Rule -> (who is decayed, whose rule it is)."""
