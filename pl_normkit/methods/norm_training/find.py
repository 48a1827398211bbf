"""Parameters of norms, and those of the head: by module type and by the traced graph, never by name."""

from __future__ import annotations

__all__ = ["NormParameters", "find_norm_parameters", "head_parameters", "parameters_under"]

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from pl_normkit.errors import ConfigError, nearest
from pl_normkit.graph import ModelGraph
from pl_normkit.graph.nodes import Kind
from pl_normkit.norm_modules import is_norm
from pl_normkit.surgery import Change
from pl_normkit.wrappers import unwrapped

_BLOCKING = (Kind.WEIGHT, Kind.NORM, Kind.ATTENTION)


@dataclass
class NormParameters:
    """The parameters of norms by name; a tied parameter stands at its first name.

    Attributes:
        scales: scales, and what else a norm of this library learns (the slope of `dyt`).
        shifts: shifts.
        modules: path -> the norm module.
        unread: what may be a norm and is not known as one.
    """

    scales: dict[str, nn.Parameter] = field(default_factory=dict)
    shifts: dict[str, nn.Parameter] = field(default_factory=dict)
    modules: dict[str, nn.Module] = field(default_factory=dict)
    unread: list[Change] = field(default_factory=list)

    @property
    def all(self) -> dict[str, nn.Parameter]:
        return self.scales | self.shifts


def find_norm_parameters(model: nn.Module, example_inputs: Any = None) -> NormParameters:
    """Norms of torch (and their subclasses in timm and elsewhere), of this library, RMS norms of transformers, which are run to know them,
    and, with `example_inputs`, norms that the traced graph shows. Raises TraceError as `ModelGraph.from_model` does."""
    model = unwrapped(model)
    known = dict(model.named_parameters())
    first = {id(parameter): name for name, parameter in known.items()}
    found = NormParameters()
    for path, module in model.named_modules():
        own = {attribute: first[id(held)] for attribute, held in module._parameters.items() if held is not None}
        if is_norm(module):
            found.modules[path] = module
            for attribute, name in own.items():
                (found.shifts if attribute.endswith("bias") else found.scales)[name] = known[name]
    if example_inputs is not None:
        _add_traced(found, known, ModelGraph.from_model(model, example_inputs, partly=True))
    for path, module in model.named_modules():
        own_names = {first[id(held)] for held in module._parameters.values() if held is not None}
        if "norm" in type(module).__name__.lower() and own_names - found.all.keys():
            hint = "" if example_inputs is not None else "; pass example_inputs"
            found.unread.append(Change(path, f"{type(module).__name__} is not known as a norm{hint}"))
    return found


def _add_traced(found: NormParameters, known: dict[str, nn.Parameter], graph: ModelGraph) -> None:
    for norm in graph.norms:
        if norm.gamma in known and norm.gamma not in found.all:
            found.scales[norm.gamma] = known[norm.gamma]
        if norm.beta in known and norm.beta not in found.all:
            found.shifts[norm.beta] = known[norm.beta]
    if graph.unseen:
        found.unread.append(Change("", graph.unseen))


def head_parameters(graph: ModelGraph) -> set[str]:
    """Parameters of the weight layers whose result reaches an output through no other weight layer, norm or residual addition.

    A feature extractor that ends in a norm or a residual addition has none. A weight tied to the embedding counts as the head's.
    """
    blocking = {norm.node for norm in graph.norms} | {add.node for add in graph.residual_adds}
    goes_on = set()
    found: set[str] = set()
    for node in reversed(graph.nodes):
        if any(user in blocking or user.kind in _BLOCKING or user in goes_on for user in node.users):
            goes_on.add(node)
        elif node.kind is Kind.WEIGHT and node not in blocking:
            found |= set(node.parameters)
    return found


def parameters_under(model: nn.Module, paths: Sequence[str], option: str) -> set[str]:
    """The parameters at, or in the modules at, `paths`, each by its first name. Raises ConfigError for a path without any."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    every = list(model.named_parameters(remove_duplicate=False))
    names: set[str] = set()
    for path in paths:
        inside = {first[id(parameter)] for name, parameter in every if name == path or name.startswith(f"{path}.")}
        if not inside:
            modules = [name for name, _ in model.named_modules()]
            raise ConfigError(f"there is no parameter at {path!r}", where=option, fix=nearest(path, modules) or "see model.named_modules()")
        names |= inside
    return names
