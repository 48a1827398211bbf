"""What each parameter of a model is for: a weight, a scale on a shortcut, a positional embedding."""

from __future__ import annotations

__all__ = [
    "GAMMAS",
    "ModelRoles",
    "Role",
    "are_sharded",
    "parameter_roles",
    "read_graph",
    "read_model",
    "read_modules",
    "read_parts",
]

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from pl_normkit.errors import TraceError
from pl_normkit.graph import ModelGraph
from pl_normkit.methods.weight_decay.core_gammas import core_blocks, core_gammas
from pl_normkit.methods.weight_decay.module_types import is_norm_scale, is_own, owners, role_in_module
from pl_normkit.methods.weight_decay.operations import Context, read_roles
from pl_normkit.methods.weight_decay.peers import decayed_by_peers
from pl_normkit.methods.weight_decay.roles import GAMMAS, Role
from pl_normkit.wrappers import unwrapped


def parameter_roles(model: nn.Module, example_inputs: Any = None) -> dict[str, Role]:
    """The role of every parameter, by its first name in `model.named_parameters()`; the model stays as it is.

    Roles come from the traced graph (which operation reads the parameter, by which argument, and where that operation stands
    among the residual branches) and from the owning module's type; never from a parameter's name or dimensions alone.

    - `weight`: the kernel of a convolution, linear, recurrent or bilinear layer, of experts, of a low-rank update, or a learned operand
      of a product.
    - `gamma_last`: scale of the last norm of a residual branch, with no weight layer after it in the branch.
    - `gamma_shortcut`: scale of a norm on the shortcut of a residual addition.
    - `gamma_branch`: scale of every other norm in a residual branch.
    - `gamma_trunk`: scale of a norm in no residual branch: stem, between stages, final, post-norm transformers, and every norm of
      a network without residual additions. A pre-activation norm that the projection shortcut reads too stands here.
    - `beta`, `bias`: shift of a norm; shift of a weight layer or a shift per channel.
    - `position`: added to activations and different from position to position; `relative_position`: added to attention logits.
    - `token`: class, register and mask tokens, learned queries and latents: joins or asks the activations as a value of its own.
    - `layer_scale`: factor at the end of a residual branch, or on its shortcut.
    - `embedding`: table looked up by the input (also when tied to the output layer), or by a constant with fewer rows than positions.
    - `temperature`: factor on attention or output logits; `slope`: of a PReLU.
    - `gain`: factor on a weight (weight normalization, magnitude of DoRA) or per channel on activations.
    - `own`: a parameter that a module of this library adds.
    - `unknown`: everything else. What the traced forward pass does not read goes by the type of its module.

    >>> import torch
    >>> layer = nn.TransformerEncoderLayer(8, 2, 16, norm_first=True)
    >>> str(parameter_roles(layer, torch.zeros(5, 2, 8))["norm1.weight"])
    'gamma_branch'

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
        core_blocks: how many residual additions such branches end in.
        is_traced: whether the graph was read, or module types alone.
        peers: rule of another library -> the parameters it decays.
        norm_scales: scales of torch's norm modules, whose role takes a graph; empty where one was read.
    """

    roles: Mapping[str, Role]
    core_gammas: frozenset[str] = frozenset()
    core_blocks: int = 0
    is_traced: bool = True
    peers: Mapping[str, frozenset[str]] = field(default_factory=dict)
    norm_scales: frozenset[str] = frozenset()


def read_model(model: nn.Module, example_inputs: Any = None) -> ModelRoles:
    """`parameter_roles` with what a decay policy needs beside them; one trace at most. Raises TraceError as that does.

    >>> import torch
    >>> read_model(nn.Linear(8, 4), torch.zeros(2, 8)).is_traced
    True
    """
    if example_inputs is None:
        return read_modules(model)
    return read_graph(model, ModelGraph.from_model(model, example_inputs))


def read_parts(model: nn.Module, calls: Sequence[tuple[nn.Module, Any]]) -> tuple[ModelRoles, list[TraceError]]:
    """`read_model` where only parts of `model` (submodules, or it itself) can be traced; the rest goes by types.

    Args:
        model: whose names the roles get.
        calls: parts with their own example inputs.

    Returns:
        The roles, and why a part could not be traced.
    """
    known, failures = read_modules(model), []
    paths = {module: path for path, module in model.named_modules()}
    for part, inputs in sorted(calls, key=lambda call: len(paths[call[0]])):  # the whole first, so that a part's own trace counts
        try:
            inside = read_model(part, inputs)
        except TraceError as failure:
            failures.append(failure)
            continue
        known = inside if not paths[part] else _joined(known, inside, f"{paths[part]}.")
    return known, failures


def _joined(known: ModelRoles, inside: ModelRoles, prefix: str) -> ModelRoles:
    found = {f"{prefix}{name}": role for name, role in inside.roles.items()}
    return replace(
        known,
        roles={name: found.get(name, role) for name, role in known.roles.items()},
        core_gammas=known.core_gammas | {f"{prefix}{name}" for name in inside.core_gammas},
        core_blocks=known.core_blocks + inside.core_blocks,
        is_traced=known.is_traced or inside.is_traced,
    )


def are_sharded(model: nn.Module) -> bool:
    """Whether parameters are shards already (DTensor), which no trace can read."""
    return any(hasattr(parameter, "to_local") for parameter in model.parameters())


def read_graph(model: nn.Module, graph: ModelGraph) -> ModelRoles:
    """`read_model` on a graph that is there already."""
    traced = dict(unwrapped(model).named_parameters())
    context = Context(graph, {name: tuple(parameter.shape) for name, parameter in traced.items()})
    read, holders = read_roles(context), owners(model)
    names = {before: name for before, (name, _) in zip(traced, model.named_parameters(), strict=True)}
    roles = {}
    for before, name in names.items():
        role = read.get(before, Role.UNKNOWN)
        role = role_in_module(*holders[name]) if role is Role.UNKNOWN else role
        is_plain = role in _PLAIN and not (role in GAMMAS and getattr(holders[name][0], "sets_own_scale", False))
        roles[name] = Role.OWN if is_own(holders[name][0]) and not is_plain else role
    core = frozenset(names[before] for before in core_gammas(context))
    return ModelRoles(roles, core, len(core_blocks(context)), peers=decayed_by_peers(model))


_PLAIN = (Role.WEIGHT, Role.BIAS, Role.BETA, Role.EMBEDDING, *GAMMAS)


def read_modules(model: nn.Module) -> ModelRoles:
    """Roles by the type of the owning module alone: `unknown` wherever the graph is needed."""
    holders = owners(model)
    roles = {name: role_in_module(*holders[name]) for name, _ in model.named_parameters()}
    scales = frozenset(name for name, holder in holders.items() if is_norm_scale(*holder))
    return ModelRoles(roles, is_traced=False, peers=decayed_by_peers(model), norm_scales=scales)
