"""`swap_norms`: other norms in place of those a model has, before training."""

from __future__ import annotations

__all__ = ["find_operator", "swap_norms"]

from typing import Any

from torch import nn

from pl_normkit.errors import ConfigError, NothingMatchedError, nearest
from pl_normkit.graph import ModelGraph
from pl_normkit.methods.norm_operators.operators import Operator, operators
from pl_normkit.methods.norm_operators.places import old_norm
from pl_normkit.methods.norm_operators.weights import without_fast_path
from pl_normkit.surgery import Change, Changes, Edit, Filter, Replace, apply_edits, get_module
from pl_normkit.wrappers import unwrapped


def swap_norms(model: nn.Module, to: str, *, example_inputs: Any = None, where: Filter | None = None, **options: Any) -> Changes:
    """Replace norms by another kind. The function changes unless the operator says otherwise: swap before training.

    Scale and shift stay the same parameter objects where the new norm has their like (a trained scale is not lost), and eps is
    carried over. To turn a trained model's layer norms into RMS norms without changing its function, use `to_rmsnorm`.

    Args:
        model: edited in place.
        to: in place of layer and RMS norms over channels: "rmsnorm", "scalenorm", "dyt", "eln", "powernorm", "unified", "prepbn",
            "fixed_std", "tdln"; in place of batch norms: "groupnorm", "evonorm", "ibn_a", "bcn"; in place of convolutions in front of a
            norm: "weight_standardized". Each file in `norm_operators/operators` adds one, with formula, source and defaults.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments, for "ibn_a" and "weight_standardized", which read
            from the traced model where they belong.
        where: called with (module, path), says whether to replace it.
        options: of the new norm, such as `alpha` of "dyt"; docs/norm_operators.md lists them.

    Returns:
        what was replaced; `skipped` lists what was left alone, and why: subclasses with a forward of their own, several dimensions.

    Raises:
        ConfigError: for an operator, an option or a value of it that does not exist, or where example inputs are missing.
        NothingMatchedError: when nothing can be replaced.
        TraceError: when the model must be traced and cannot. The model is untouched in each case.

    Source: each operator names its own.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8))
    >>> print(swap_norms(model, to="dyt", alpha=1.0))
    1: dyt in place of LayerNorm
    """
    operator = find_operator(to, options)
    model = unwrapped(model)
    graph = None
    if operator.reads_graph:
        if example_inputs is None:
            raise ConfigError(f"{to} is placed by the traced model, and the model's inputs are not known", fix="pass example_inputs=")
        graph = ModelGraph.from_model(model, example_inputs)
    edits: list[Edit] = []
    skipped: list[Change] = []
    for place in operator.places(model, graph):
        old = get_module(model, place.path)
        reason = "not chosen" if where is not None and not where(old, place.path) else place.reason
        if reason:
            skipped.append(Change(place.path, reason))
            continue
        new = operator.make(old_norm(old), {**operator.options, **options})
        if type(new) is type(old):
            skipped.append(Change(place.path, f"it is {to} already"))
            continue
        keys = set(old.state_dict()) ^ set(new.state_dict())
        edits.append(Replace(place.path, new, f"{to} in place of {type(old).__name__}", keys))
        edits += [Replace(path, nn.Identity(), f"{to} acts in its place") for path in place.goes]
    if not edits:
        reasons = "; ".join(map(str, skipped)) or f"it replaces {operator.replaces}"
        raise NothingMatchedError(f"nothing can be replaced by {to}", evidence=reasons)
    return apply_edits(model, [*edits, *without_fast_path(model, edits)], skipped)


def find_operator(to: str, options: dict[str, Any]) -> Operator:
    """The operator `to`. Raises ConfigError where it, or an option of it, does not exist."""
    operator = operators().get(to)
    if operator is None:
        raise ConfigError(f"there is no norm {to!r}", fix=nearest(to, operators()) or f"one of {', '.join(sorted(operators()))}")
    for name in options:
        if name not in operator.options:
            raise ConfigError(f"{to} has no option {name!r}", fix=f"it has {', '.join(operator.options) or 'none'}")
    return operator
