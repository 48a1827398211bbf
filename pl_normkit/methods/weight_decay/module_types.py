"""The role of a parameter by the type of the module that holds it: what is known without a graph."""

from __future__ import annotations

__all__ = ["is_norm_scale", "is_own", "owners", "role_in_module"]

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from pl_normkit.methods.weight_decay.roles import Role

_NORM_TYPES = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_WEIGHT_TYPES = (_ConvNd, nn.Linear, nn.Bilinear)


def owners(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """The module that holds each parameter, and the attribute it holds it by; tied parameters count at their first name."""
    first = {name for name, _ in model.named_parameters()}
    found = {}
    for path, module in model.named_modules():
        for attribute in module._parameters:
            name = f"{path}.{attribute}" if path else attribute
            if name in first:
                found[name] = (module, attribute)
    return found


def role_in_module(module: nn.Module, attribute: str) -> Role:
    """`unknown` wherever the graph is needed: scales of norms, embeddings, parameters of modules that torch does not know."""
    if is_own(module):
        return Role.OWN
    if isinstance(module, _NORM_TYPES):
        return Role.BETA if attribute == "bias" else Role.UNKNOWN
    if isinstance(module, _WEIGHT_TYPES):
        return {"weight": Role.WEIGHT, "bias": Role.BIAS}.get(attribute, Role.UNKNOWN)
    if isinstance(module, nn.MultiheadAttention):
        if attribute in ("bias_k", "bias_v"):
            return Role.TOKEN
        return Role.BIAS if attribute == "in_proj_bias" else Role.WEIGHT
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        return Role.BIAS if attribute.startswith("bias") else Role.WEIGHT
    return Role.SLOPE if isinstance(module, nn.PReLU) else Role.UNKNOWN


def is_norm_scale(module: nn.Module, attribute: str) -> bool:
    return isinstance(module, _NORM_TYPES) and attribute == "weight"


def is_own(module: nn.Module) -> bool:
    """Whether this library made the module's class (recipes are user code)."""
    home = type(module).__module__
    return home.startswith("pl_normkit.") and not home.startswith("pl_normkit.recipes")
