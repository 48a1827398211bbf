"""Parameter groups by role: built from a model, or split from groups that exist."""

from __future__ import annotations

__all__ = ["Group", "GroupSplitter", "describe_decay", "param_groups", "parameter_names"]

import fnmatch
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from pl_normkit.errors import ConfigError, NormkitWarning
from pl_normkit.methods.weight_decay.find import ModelRoles, read_model
from pl_normkit.methods.weight_decay.policy import DEFAULT, DecayPolicy, resolve_policy
from pl_normkit.methods.weight_decay.roles import GAMMAS, Role
from pl_normkit.wrappers import unwrapped_name

Group = dict[str, Any]


def param_groups(
    model: nn.Module,
    weight_decay: float,
    example_inputs: Any = None,
    *,
    policy: str | DecayPolicy = DEFAULT,
    overrides: Mapping[str, float] | None = None,
    groups: Sequence[Mapping[str, Any]] | None = None,
    known: ModelRoles | None = None,
) -> list[Group]:
    """Parameter groups for an optimizer, with weight decay only where the role of a parameter wants it.

    Every parameter of the model (frozen ones too) is in exactly one group. The order is fixed: the given groups in their order,
    in each the stronger decay first, parameters in the model's order; groups with equal options are one group.

    >>> import torch
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    >>> groups = param_groups(model, 0.05, torch.zeros(2, 3, 8, 8))
    >>> [(group["weight_decay"], len(group["params"])) for group in groups]
    [(0.05, 1), (0.0, 3)]

    Args:
        model: the module.
        weight_decay: decay of the weights, as the optimizer takes it (L2 in SGD, decoupled in AdamW).
        example_inputs: as for `parameter_roles`. Without it only module types are read, and what needs the graph is not decayed.
        policy: `"no_norm"` (no norm, bias or special parameter is decayed), `"gamma_roles"`, `"gamma_roles_extended"`, `"all"`, or
            `"timm"`, `"transformers"`, `"ndim"` for the very sets of those libraries, which need no inputs; or a policy of your own.
        overrides: parameter-name pattern -> multiple of `weight_decay` (0 = none); the last match decides.
        groups: existing groups to split; their other options (`lr`, `betas`, layer-wise learning rates) are kept. `params` are
            tensors or (name, tensor) pairs. Parameters of the model that are in none of them stay out.
        known: roles read earlier with `read_model`, to save the trace.

    Raises:
        ConfigError: for a negative decay, an unknown policy, an override that matches nothing, a parameter in two groups.
        TraceError: when the model cannot be traced.
    """
    if not weight_decay >= 0:
        raise ConfigError(f"weight_decay is 0 or positive, not {weight_decay!r}", where="param_groups")
    policy = resolve_policy(policy, overrides)
    known = known or read_model(model, example_inputs if policy.needs_roles else None)
    splitter = GroupSplitter(known, policy, parameter_names(model), weight_decay)
    wanted = [{"params": list(model.parameters())}] if groups is None else [dict(group) for group in groups]
    _refuse_doubles(wanted, splitter.names)
    split = [part for group in wanted for part in splitter.split(group, {})]
    if weight_decay > 0:
        splitter.warn_unknown(part for group in wanted for part in group["params"])
    return _merge_equal(split)


def parameter_names(model: nn.Module) -> dict[int, str]:
    """`id(parameter)` -> its name without the prefixes of wrappers (FSDP, torch.compile, activation checkpointing)."""
    return {id(parameter): unwrapped_name(name) for name, parameter in model.named_parameters()}


@dataclass
class GroupSplitter:
    """Splits optimizer groups by the decay each parameter should get.

    Attributes:
        known: roles of the model.
        policy: which parameters are decayed.
        names: `id(parameter)` -> name, as the parameters are now (`parameter_names`).
        weight_decay: decay of the weights; None takes each group's own, so a group without decay stays without.
    """

    known: ModelRoles
    policy: DecayPolicy
    names: Mapping[int, str]
    weight_decay: float | None = None

    def __post_init__(self) -> None:
        self._factors = {unwrapped_name(name): factor for name, factor in self.policy.factors(self.known).items()}

    def split(self, group: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[Group]:
        """`group` in parts of equal decay, the stronger first; one part when nothing differs.

        Args:
            group: `params` (tensors or (name, tensor) pairs) and options.
            defaults: the optimizer's defaults, which hold for options the group does not name.
        """
        own = group.get("weight_decay", defaults.get("weight_decay", 0.0))
        base = own if self.weight_decay is None else self.weight_decay
        parts: dict[float, list[Any]] = defaultdict(list)
        for item in _items(group["params"]):
            parts[base * self._factor_of(_tensor_of(item))].append(item)
        rest = {key: value for key, value in group.items() if key not in ("params", "param_names")}
        if not parts:
            return [{**rest, "params": [], "weight_decay": base}]
        made = [{**rest, "params": parts[decay], "weight_decay": decay} for decay in sorted(parts, reverse=True)]
        for part in made[1:]:
            if "name" in part:  # names of groups tell them apart
                part["name"] = f"{part['name']}, decay {part['weight_decay']:g}"
        return made

    def _factor_of(self, parameter: Tensor) -> float:
        name = self.names.get(id(parameter), "")
        return self._factors[name] if name in self._factors else self.policy.factor_outside(parameter)

    def warn_unknown(self, items: Iterable[Any]) -> None:
        """One warning naming the parameters whose role is unknown and that no override decides on."""
        if not self.policy.needs_roles:
            return
        roles = {unwrapped_name(name): role for name, role in self.known.roles.items()}
        same_for_all = len({self.policy.line(role).factor for role in (*GAMMAS, Role.UNKNOWN)}) == 1
        scales = {unwrapped_name(name) for name in self.known.norm_scales} if same_for_all else set()
        unknown = []
        for item in items:
            name = self.names.get(id(_tensor_of(item)), "")
            decided = name in scales or any(fnmatch.fnmatchcase(name, pattern) for pattern in self.policy.overrides)
            if roles.get(name, Role.UNKNOWN) is Role.UNKNOWN and not decided:
                unknown.append(name or "a tensor outside the model")
        if unknown:
            shown = ", ".join(unknown[:6]) + (f" and {len(unknown) - 6} more" if len(unknown) > 6 else "")
            why = "" if self.known.is_traced else "; norm scales, embeddings and bare parameters need example_inputs"
            warnings.warn(
                f"the role of {len(unknown)} parameters is unknown, so policy {self.policy.name!r} gives them "
                f"{self.policy.line(Role.UNKNOWN).factor:g} x weight decay: {shown}{why}. Decide with overrides={{pattern: factor}}",
                NormkitWarning,
                stacklevel=3,
            )


def describe_decay(known: ModelRoles, policy: str | DecayPolicy = DEFAULT) -> str:
    """A table: for each role in the model how many parameters it has, their factor, and what stands behind that.

    >>> print(describe_decay(read_model(nn.Linear(8, 4))))
    role               count  x decay  ground
    weight                 1        1  derived: what weight decay is for
    bias                   1        0  derived: shifts are not covered by the derivation
    """
    policy = resolve_policy(policy)
    factors = policy.factors(known)
    rows = ["role               count  x decay  ground"]
    for role in Role:
        of_role = [factors[name] for name, found in known.roles.items() if found is role]
        for factor in sorted(set(of_role), reverse=True):
            is_rule = bool(policy.peer) or factor == policy.line(role).factor
            ground = policy.ground(role) if is_rule else "an override, or low confidence (policy.extensions is off)"
            rows.append(f"{role:<18} {of_role.count(factor):>5}  {factor:>7g}  {ground}")
    return "\n".join(rows)


def _items(params: Any) -> list[Any]:
    return [params] if isinstance(params, Tensor) else list(params)


def _tensor_of(item: Any) -> Tensor:
    tensor: Tensor = item[1] if isinstance(item, tuple) else item
    return tensor


def _refuse_doubles(groups: Sequence[Group], names: Mapping[int, str]) -> None:
    """Reads generators into lists, and refuses a tensor that comes twice."""
    seen: set[int] = set()
    for index, group in enumerate(groups):
        group["params"] = _items(group["params"])
        own: set[int] = set()
        for item in group["params"]:
            tensor = _tensor_of(item)
            if id(tensor) in seen | own:
                name = names.get(id(tensor), "(not of the model)")
                where = "twice in one group" if id(tensor) in own else "in two groups"
                raise ConfigError(f"parameter {name!r} is {where}", where=f"groups[{index}]", fix="list every parameter once")
            own.add(id(tensor))
        seen |= own


def _merge_equal(groups: Sequence[Group]) -> list[Group]:
    """Groups with equal options become one, at the place of the first."""
    merged: list[Group] = []
    for group in groups:
        options = {key: value for key, value in group.items() if key != "params"}
        twin = next((known for known in merged if {key: value for key, value in known.items() if key != "params"} == options), None)
        if twin is None:
            merged.append(dict(group))
        else:
            twin["params"] = [*twin["params"], *group["params"]]
    return merged
