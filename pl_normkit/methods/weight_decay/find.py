"""What each parameter is for: a weight, a scale on a shortcut, a positional embedding."""

from __future__ import annotations

__all__ = [
    "GAMMAS",
    "ModelRoles",
    "Role",
    "owners",
    "parameter_roles",
    "read_graph",
    "read_model",
    "read_modules",
    "read_part",
]

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from pl_normkit.graph import ModelGraph
from pl_normkit.methods.weight_decay.reads import Context, core_gammas, read_roles
from pl_normkit.methods.weight_decay.roles import GAMMAS, Role
from pl_normkit.wrappers import unwrapped


def parameter_roles(model: nn.Module, example_inputs: Any = None) -> dict[str, Role]:
    """The role of every parameter, by its first name in `model.named_parameters()`; the model stays as it is.

    Roles come from the traced graph (which operation reads the parameter, by which argument, and where that operation stands
    among the residual branches) and from the owning module's type; never from a parameter's name or dimensions alone.

    - `weight`: the kernel of a convolution, linear, recurrent or bilinear layer, or a learned operand of a product.
    - `gamma_last`: scale of the last norm of a residual branch, with no weight layer after it in the branch.
    - `gamma_shortcut`: scale of a norm on the shortcut of a residual addition.
    - `gamma_branch`: scale of every other norm in a residual branch.
    - `gamma_trunk`: scale of a norm in no residual branch: stem, between stages, final, post-norm transformers, and every norm of
      a network without residual additions. A pre-activation norm that the projection shortcut reads too stands here.
    - `beta`, `bias`: shift of a norm; shift of a weight layer or a shift per channel.
    - `position`: added to activations and different from position to position; `relative_position`: added to attention logits.
    - `token`: class, register and mask tokens, learned queries: joins the activations as a value of its own.
    - `layer_scale`: factor at the end of a residual branch, or on its shortcut.
    - `embedding`: table looked up by the input (also when tied to the output layer), or by a constant with fewer rows than positions.
    - `temperature`: factor on attention or output logits; `gain`: factor on a weight (weight normalization); `slope`: of a PReLU.
    - `own`: a parameter that a module of this library adds.
    - `unknown`: everything else, and every parameter that the traced forward pass does not read.

    Args:
        model: any module that `torch.export` reads; the meta device is enough.
        example_inputs: what the model is called with: a tensor, a tuple of positional or a dict of keyword arguments. Without it
            only module types are read; scales of norms, embeddings and bare parameters stay `unknown`, since they need the graph.

    Raises:
        TraceError: when the model cannot be traced.

    Source: the classes `gamma_last`, `gamma_shortcut`, `gamma_branch` and the stem are derived here from the principles in the
    abstract of arXiv 2205.07260; the abstract does not name the classes.
    """
    return dict(read_model(model, example_inputs).roles)


@dataclass(frozen=True)
class ModelRoles:
    """What is known of a model's parameters.

    Attributes:
        roles: the role of every parameter by name.
        core_gammas: scales that our derivation speaks about with more than low confidence: batch norms in post-activation
            residual branches without depthwise convolutions, on their shortcuts, and in the stem before the first of them.
        is_traced: whether the graph was read, or module types alone.
    """

    roles: Mapping[str, Role]
    core_gammas: frozenset[str] = frozenset()
    is_traced: bool = True


def read_model(model: nn.Module, example_inputs: Any = None) -> ModelRoles:
    """`parameter_roles` with what a decay policy needs beside them; one trace at most. Raises TraceError as that does."""
    if example_inputs is None:
        return read_modules(model)
    return read_graph(model, ModelGraph.from_model(model, example_inputs))


def read_part(model: nn.Module, path: str, example_inputs: Any = None) -> ModelRoles:
    """`read_model` where only the submodule at `path` can be traced; `example_inputs` are its own, the rest stays `unknown`."""
    part = read_model(model.get_submodule(path), example_inputs)
    found = {f"{path}.{name}": role for name, role in part.roles.items()}
    roles = {name: found.get(name, Role.UNKNOWN) for name, _ in model.named_parameters()}
    return ModelRoles(roles, frozenset(f"{path}.{name}" for name in part.core_gammas), part.is_traced)


def read_graph(model: nn.Module, graph: ModelGraph) -> ModelRoles:
    """`read_model` on a graph that is there already."""
    context = Context(graph)
    read, core, holders = read_roles(context), core_gammas(context), owners(model)
    traced_names = [name for name, _ in unwrapped(model).named_parameters()]
    names = {traced: name for traced, (name, _) in zip(traced_names, model.named_parameters(), strict=True)}
    roles = {}
    for traced, name in names.items():
        role = read.get(traced, Role.UNKNOWN)
        roles[name] = Role.OWN if _is_own(holders[name][0]) and role not in _PLAIN else role
    return ModelRoles(roles, frozenset(names[traced] for traced in core))


_PLAIN = (Role.WEIGHT, Role.BIAS, Role.BETA, Role.EMBEDDING, *GAMMAS)


def read_modules(model: nn.Module) -> ModelRoles:
    """Roles by the type of the owning module alone: `unknown` wherever the graph is needed."""
    roles = {name: _role_in_module(*holder) for name, holder in owners(model).items()}
    return ModelRoles({name: roles[name] for name, _ in model.named_parameters()}, is_traced=False)


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


_NORM_TYPES = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_WEIGHT_TYPES = (_ConvNd, nn.Linear, nn.Bilinear)


def _role_in_module(module: nn.Module, attribute: str) -> Role:
    if _is_own(module):
        return Role.OWN
    if isinstance(module, _NORM_TYPES):
        return Role.BETA if attribute == "bias" else Role.UNKNOWN
    if isinstance(module, _WEIGHT_TYPES):
        return {"weight": Role.WEIGHT, "bias": Role.BIAS}.get(attribute, Role.UNKNOWN)
    if isinstance(module, nn.MultiheadAttention):
        if attribute in ("bias_k", "bias_v"):
            return Role.TOKEN
        return Role.BIAS if attribute == "in_proj_bias" else Role.WEIGHT
    if isinstance(module, nn.RNNBase):
        return Role.BIAS if attribute.startswith("bias") else Role.WEIGHT
    return Role.SLOPE if isinstance(module, nn.PReLU) else Role.UNKNOWN


def _is_own(module: nn.Module) -> bool:
    """Whether this library made the module's class (recipes are user code)."""
    home = type(module).__module__
    return home.startswith("pl_normkit.") and not home.startswith("pl_normkit.recipes")
