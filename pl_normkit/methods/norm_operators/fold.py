"""`fold_norms`: the scale and shift of norms into the linear layers that read them."""

from __future__ import annotations

__all__ = ["Affine", "fold_edit", "fold_norms", "folded_values", "layers_behind", "read_affine", "why_layers_cannot"]

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pl_normkit.errors import NothingMatchedError
from pl_normkit.graph import ModelGraph, Node
from pl_normkit.graph.structure import Norm
from pl_normkit.methods.norm_operators.last_dim import Layer, averages_rows, factor_of, keeps_rows, layer_of, readers_by_parameter
from pl_normkit.methods.norm_operators.modules import ShiftedRMSNorm
from pl_normkit.methods.norm_operators.places import is_plain_row_norm
from pl_normkit.methods.norm_operators.weights import convert_checked, refuse_sharded
from pl_normkit.norm_modules import eps_of
from pl_normkit.surgery import Change, Changes, Edit, Filter, Replace, get_module
from pl_normkit.values import SetValues
from pl_normkit.wrappers import unwrapped


def fold_norms(model: nn.Module, example_inputs: Any, *, keep_keys: bool = True, filter_fn: Filter | None = None) -> Changes:
    """Put scale and shift of layer norms and RMS norms into the linear layers that read them; the function in eval mode stays.

    `W <- W diag(gamma)` and `b <- b + W beta` with the old W; then gamma is 1 and beta 0, so that every key stays and the checkpoint
    still loads into the same class. A norm is folded where the traced model shows that linear layers alone read its output (through
    views, slices, dropout and means over tokens), that nothing else reads their weights, and that a bias can take its beta. The rest is
    in `skipped`, with the reason: a tied head, a post-norm's residual stream, attention that reads packed weights.

    Use it for inference: training on would start from another parametrization, in which weight decay and learning rates act otherwise.

    Args:
        model: edited in place; parameters stay the same objects.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments, as for `audit`; the model is run on them before
            and after, and left as it was where the outputs differ.
        keep_keys: False takes scale and shift of torch's and timm's own norms, and of `to_rmsnorm`'s, out of the model, so that they cost
            no time; their state_dict keys go.
        filter_fn: called with (module, path) for each norm, says whether to fold it.

    Raises:
        NothingMatchedError: when no norm can be folded; its evidence lists the reasons.
        EditError: for weights that are sharded or on the meta device.
        TraceError: when `torch.export` cannot read the model. The model is untouched in each case.

    Source: arXiv 2305.14858 (code) folds gamma and beta before it drops a channel; the conditions are derived here.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2)).eval()
    >>> with torch.no_grad():
    ...     _ = model[1].weight.fill_(3.0)
    >>> print(fold_norms(model, torch.randn(5, 4)))
    1: scale and shift folded into 2
    >>> model[1].weight.tolist() == [1.0] * 8
    True
    """
    model = unwrapped(model)
    refuse_sharded(model)
    graph = ModelGraph.from_model(model, example_inputs, training=False)
    readers = readers_by_parameter(graph)
    edits: list[Edit] = []
    skipped: list[Change] = []
    found_any = False
    for norm in graph.norms:
        if norm.kind not in ("layer", "rms") or not norm.gamma:
            continue
        if filter_fn is not None and not filter_fn(get_module(model, norm.module), norm.module):
            skipped.append(Change(norm.module, "not chosen by the filter"))
            continue
        found = read_affine(norm, readers)
        if isinstance(found, str):
            skipped.append(Change(norm.module, found))
        else:
            found_any = True
            edits += [] if _is_folded(model, found) else [fold_edit(model, norm.module, found)]
            edits += [] if keep_keys else _without_parameters(model, norm.module)
    if not found_any:
        raise NothingMatchedError("no norm can be folded", evidence="; ".join(map(str, skipped)))
    return convert_checked(model, example_inputs, edits, skipped)


@dataclass(frozen=True)
class Affine:
    """Scale and shift ("" without one), the operations that apply them, and the layers that read the result."""

    gamma: str
    beta: str
    nodes: tuple[Node, ...]
    layers: tuple[Layer, ...]


def read_affine(norm: Norm, readers: dict[str, set[Node]]) -> Affine | str:
    """What can be folded, or why not."""
    nodes = [norm.node]
    applied = _applied_by(norm.node)
    while not {name for name in (norm.gamma, norm.beta) if name} <= applied:
        users = nodes[-1].users
        if len(users) != 1 or not (keeps_rows(users[0]) or factor_of(users[0]) == norm.gamma or norm.beta in users[0].parameters):
            return "its scale is not applied as it is stored"
        nodes.append(users[0])
        applied |= _applied_by(users[0])
    beta = norm.beta or _shift_after(nodes)
    layers = layers_behind(nodes[-1])
    if isinstance(layers, str):
        return layers
    found = Affine(norm.gamma, beta, tuple(nodes), tuple(layers))
    return _why_not(found, readers) or found


def _shift_after(nodes: list[Node]) -> str:
    """The parameter that a module adds behind torch's RMS norm, which has none; its addition joins `nodes`."""
    users = nodes[-1].users
    if len(users) != 1 or users[0].op != "add" or len(users[0].inputs) != 1 or len(users[0].reads) != 1:
        return ""
    if users[0].target.kwargs or users[0].module != nodes[0].module or not (found := _applied_by(users[0])):
        return ""
    nodes.append(users[0])
    return found.pop()


def _applied_by(node: Node) -> set[str]:
    """Parameters of one value a column that `node` reads as they are stored."""
    width = node.shape[-1:]
    return {read.parameter for read in node.reads if len(read.path) == 1 and read.path[0].shape == width}


def layers_behind(start: Node) -> list[Layer] | str:
    layers: list[Layer] = []
    waiting = [start]
    while waiting:
        node = waiting.pop()
        if any(user.op == "output" for user in node.target.users):
            return "the model returns its output"
        for user in node.users:
            layer = layer_of(user)
            if layer is not None:
                layers.append(layer)
            elif keeps_rows(user) or averages_rows(user):
                waiting.append(user)
            else:
                return f"{user.op} of {user.module or 'the model'} reads its output too"
    return layers or "nothing reads its output"


def _why_not(found: Affine, readers: dict[str, set[Node]]) -> str:
    own = set(found.nodes)
    for name in filter(None, (found.gamma, found.beta)):
        if readers[name] - own:
            return f"{name} is shared with another norm"
    return why_layers_cannot(found.layers, readers, has_shift=bool(found.beta))


def why_layers_cannot(layers: Sequence[Layer], readers: dict[str, set[Node]], *, has_shift: bool) -> str:
    """Why `layers` cannot take a scale and a shift of what they read, "" where they can."""
    own = {layer.node for layer in layers}
    for layer in layers:
        others = readers[layer.weight] - own
        if others:
            return f"{layer.weight} is tied: {min(others, key=lambda node: node.index).module or 'the model'} reads it too"
        if has_shift and not layer.bias:
            return f"{layer.node.module or 'the layer'} has no bias to take the shift"
        if has_shift and readers[layer.bias] - own:
            return f"{layer.bias} is read elsewhere too"
    return ""


def _is_folded(model: nn.Module, found: Affine) -> bool:
    gamma = model.get_parameter(found.gamma)
    return bool((gamma == 1).all()) and not (found.beta and bool(model.get_parameter(found.beta).any()))


def _without_parameters(model: nn.Module, path: str) -> list[Edit]:
    old = get_module(model, path)
    if not is_plain_row_norm(old) and type(old) is not ShiftedRMSNorm:
        return []
    kind: Any = nn.LayerNorm if isinstance(old, nn.LayerNorm) else nn.RMSNorm
    new: nn.Module = kind(old.normalized_shape, eps=eps_of(old), elementwise_affine=False)
    has_hooks = old._forward_hooks or old._forward_pre_hooks
    return [] if has_hooks or not path else [Replace(path, new, "norm without parameters", ("weight", "bias"))]


@torch.no_grad()
def fold_edit(model: nn.Module, path: str, found: Affine) -> SetValues:
    gamma = model.get_parameter(found.gamma)
    values: dict[str, Tensor] = {found.gamma: torch.ones_like(gamma)}
    shift = None
    if found.beta:
        shift = model.get_parameter(found.beta).double()
        values[found.beta] = torch.zeros_like(gamma)
    values |= folded_values(model, found.layers, gamma.double(), shift)
    names = ", ".join(sorted({layer.node.module for layer in found.layers}))
    return SetValues(path, values, f"scale and shift folded into {names or 'the model'}")


@torch.no_grad()
def folded_values(model: nn.Module, layers: Sequence[Layer], gain: Tensor, shift: Tensor | None) -> dict[str, Tensor]:
    """New weights and biases, by name, with which `layers` read x as they read gain * x + shift before."""
    values: dict[str, Tensor] = {}
    for layer in {layer.weight: layer for layer in layers}.values():
        weight = model.get_parameter(layer.weight).double()
        values[layer.weight] = weight * (gain if layer.outputs == 0 else gain[:, None])
        if shift is not None:
            values[layer.bias] = model.get_parameter(layer.bias).double() + (weight @ shift if layer.outputs == 0 else shift @ weight)
    return values
