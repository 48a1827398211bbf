"""Remedies on a built network. Each changes the function, so each belongs at the start of training; existing keys and parameters stay."""

from __future__ import annotations

__all__ = ["apply_fewer_groups", "apply_positional_time", "apply_time_bias"]

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from pl_normkit.errors import EditError, NothingMatchedError
from pl_normkit.graph import Kind, ModelGraph, Node
from pl_normkit.methods.timestep_embedding.find import TimeInjection, TimeNorm, find_time_injections
from pl_normkit.methods.timestep_embedding.modules import AddAtPositions, PositionalPlane, SecondProjection, TimeSlot
from pl_normkit.surgery import AttachAfter, Change, Changes, Edit, Filter, Insert, SetAttributes, Undo, apply_edits, get_module
from pl_normkit.wrappers import unwrapped

CHANNELS_PER_GROUP = 8
_CHILD = "positional_time"


def apply_positional_time(model: nn.Module, example_inputs: Any, *, filter_fn: Filter | None = None) -> Changes:
    """Let a time that a norm takes away vary over positions.

    Where e = Linear(time) is added before a norm, a second linear layer of the same input gives e2, and e2 pi is added before the norm;
    where t is concatenated as a constant plane, the plane becomes t pi. Pi has mean 0 and variance 1 over positions. Works on a
    diffusers UNet as it is. The layer starts as torch starts a linear layer, so the function changes: apply it before training, or
    train on.

    Args:
        model: edited in place; its new parameters have keys of their own below the time layers.
        example_inputs: what it is called with, the time as a tensor among them.
        filter_fn: called with (norm, path), says whether to act before it.

    Returns:
        what was done; `skipped` lists the places that were left alone, and why.

    Raises:
        NothingMatchedError: when no time is added or concatenated before a norm that takes something of it. The model is untouched.
        TraceError: when the model cannot be read.

    Source: the idea is published with arXiv 2405.14126; this form is derived here.

    >>> from pl_normkit.methods.timestep_embedding.modules import PositionalTimeEmbedding
    >>> class Block(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.conv, self.time, self.norm = nn.Conv2d(3, 8, 3), nn.Linear(4, 8), nn.InstanceNorm2d(8)
    ...     def forward(self, x, t):
    ...         return self.norm(self.conv(x) + self.time(t)[:, :, None, None])
    >>> print(apply_positional_time(Block(), (torch.randn(2, 3, 8, 8), torch.randn(2, 4))))
    time: a second projection of the time, which varies over positions
    norm: receives the time that varies over positions
    """
    model = unwrapped(model)
    graph = ModelGraph.from_model(model, example_inputs)
    edits: list[Edit] = []
    skipped: list[Change] = []
    slots: dict[str, TimeSlot] = {}
    for injection in _before_norms(graph):
        if injection.kind == "concat":
            plan = _plan_planes(model, injection, filter_fn)
        elif any(isinstance(edit, Insert) and edit.path == _first_taking(injection).module for edit in edits):
            plan = Change(_first_taking(injection).module, "another signal varies over positions there already")
        else:
            plan = _plan_offset(model, graph, injection, filter_fn, slots)
        if isinstance(plan, Change):
            skipped.append(plan)
        else:
            edits += plan
    has_it = any(isinstance(module, (AddAtPositions, PositionalPlane)) for module in model.modules())
    if not edits and not has_it:
        raise _nothing("no time that could vary over positions enters before a norm", skipped)
    return apply_edits(model, edits, skipped)


def apply_time_bias(model: nn.Module, example_inputs: Any, *, filter_fn: Filter | None = None) -> Changes:
    """Start with a zero bias in the layer whose output the time is added to, and a bias that is not zero in the time layer.

    A bias of zeros in the time layer is drawn anew, uniform in +-1/sqrt(fan in); another one stays. It does not depend on the time, so
    the effect is expected to be small. Concatenated planes share one bias with the features and are left alone.

    Args:
        model: edited in place, before training: values only. `undo` writes the old values back.
        example_inputs: as for `apply_positional_time`.
        filter_fn: called with (norm, path), says whether to act there.

    Raises:
        NothingMatchedError: when there is no such pair of layers. The model is untouched.

    Source: published with arXiv 2405.14126; the reason for it is derived here.

    >>> class Block(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.conv, self.time, self.norm = nn.Conv2d(3, 8, 3), nn.Linear(4, 8), nn.GroupNorm(4, 8)
    ...     def forward(self, x, t):
    ...         return self.norm(self.conv(x) + self.time(t)[:, :, None, None])
    >>> block = Block()
    >>> changes = apply_time_bias(block, (torch.randn(2, 3, 8, 8), torch.randn(2, 4)))
    >>> block.conv.bias.abs().max().item()
    0.0
    """
    model = unwrapped(model)
    edits: list[Edit] = []
    skipped: list[Change] = []
    for injection in _before_norms(ModelGraph.from_model(model, example_inputs)):
        norm = _first_taking(injection)
        if filter_fn is not None and not filter_fn(get_module(model, norm.module), norm.module):
            skipped.append(Change(norm.module, "not chosen by the filter"))
            continue
        operand, time = _layer_of(model, injection.carrier), _layer_of(model, injection.signal)
        if injection.kind == "concat" or operand is None or time is None or time[1].bias is None:
            skipped.append(Change(injection.node.module, "the features and the time do not come from two layers with a bias of their own"))
            continue
        if operand[1].bias is not None:
            edits.append(_SetValues(operand[0], "bias", torch.zeros_like(operand[1].bias), "zero bias before the time is added"))
        if not time[1].bias.any():
            bound = 1 / math.sqrt(time[1].weight[0].numel())
            drawn = torch.empty_like(time[1].bias, requires_grad=False).uniform_(-bound, bound)
            edits.append(_SetValues(time[0], "bias", drawn, "bias of the time drawn anew"))
    if not edits:
        raise _nothing("no time is added to the output of a layer before a norm", skipped)
    return apply_edits(model, edits, skipped)


def apply_fewer_groups(
    model: nn.Module, example_inputs: Any, *, channels_per_group: int = CHANNELS_PER_GROUP, filter_fn: Filter | None = None
) -> Changes:
    """Give group norms that take from a time before them fewer groups: the most that divide the channels into groups large enough.

    Weights stay, since the affine parameters are per channel; the statistics change, so retrain.

    Args:
        model: edited in place.
        example_inputs: as for `apply_positional_time`.
        filter_fn: called with (norm, path), says whether to act there.
        channels_per_group: fewest channels in a group; a norm with fewer channels gets one group.

    Raises:
        NothingMatchedError: when no group norm with smaller groups follows a time. The model is untouched.

    Source: published with arXiv 2405.14126; the number 8 (a group norm keeps 7/8 of the variance) is derived here.

    >>> class Block(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.conv, self.time, self.norm = nn.Conv2d(3, 64, 3), nn.Linear(4, 64), nn.GroupNorm(32, 64)
    ...     def forward(self, x, t):
    ...         return self.norm(self.conv(x) + self.time(t)[:, :, None, None])
    >>> print(apply_fewer_groups(Block(), (torch.randn(2, 3, 8, 8), torch.randn(2, 4))))
    norm: 8 groups instead of 32; retrain, the statistics are others
    """
    model = unwrapped(model)
    edits: list[Edit] = []
    skipped: list[Change] = []
    for norm in _taking(ModelGraph.from_model(model, example_inputs)):
        module = get_module(model, norm.module)
        if not isinstance(module, nn.GroupNorm):
            is_norm = isinstance(module, (_NormBase, nn.LayerNorm))
            skipped.append(Change(norm.module, f"{type(module).__name__} has no groups to change" if is_norm else "the norm is no module"))
        elif filter_fn is not None and not filter_fn(module, norm.module):
            skipped.append(Change(norm.module, "not chosen by the filter"))
        elif norm.channels_per_group < channels_per_group:
            groups = next(count for count in range(norm.groups, 0, -1) if count == 1 or _divides(count, norm.channels, channels_per_group))
            what = f"{groups} groups instead of {norm.groups}; retrain, the statistics are others"
            edits.append(SetAttributes(norm.module, {"num_groups": groups}, what))
    if not edits:
        raise _nothing("no group norm with small groups follows a time", skipped)
    return apply_edits(model, edits, skipped)


def _divides(count: int, channels: int, least: int) -> bool:
    return channels % count == 0 and channels // count >= least


def _before_norms(graph: ModelGraph) -> Iterator[TimeInjection]:
    for injection in find_time_injections(graph):
        if any(norm.kept < 1 for norm in injection.norms):
            yield injection


def _first_taking(injection: TimeInjection) -> TimeNorm:
    return min((norm for norm in injection.norms if norm.kept < 1), key=lambda norm: norm.norm.node.index)


def _taking(graph: ModelGraph) -> list[TimeNorm]:
    found = {norm.module: norm for injection in _before_norms(graph) for norm in injection.norms if norm.kept < 1}
    return list(found.values())


def _plan_offset(
    model: nn.Module, graph: ModelGraph, injection: TimeInjection, filter_fn: Filter | None, slots: dict[str, TimeSlot]
) -> list[Edit] | Change:
    """`slots` are those of the time layers so far: a layer whose output is added before several norms has one."""
    norm = _first_taking(injection)
    host = get_module(model, norm.module)
    time = _layer_of(model, injection.signal)
    if not isinstance(host, (_NormBase, nn.GroupNorm)):
        return Change(norm.module, "the norm is no module")
    if filter_fn is not None and not filter_fn(host, norm.module):
        return Change(norm.module, "not chosen by the filter")
    if time is None or not isinstance(time[1], nn.Linear):
        return Change(norm.module, "the time does not come from a linear layer of its own")
    if len(norm.norm.node.inputs[0].shape) < 3:
        return Change(norm.module, "there are no positions to vary over")
    if _CHILD in host._modules or _CHILD in time[1]._modules:
        return Change(norm.module, "receives a positional time already")
    if graph.calls[time[0], "linear"] != graph.calls[norm.module, norm.norm.node.op]:
        return Change(norm.module, "the time layer and the norm do not run equally often")
    if time[1].out_features != norm.channels:
        return Change(norm.module, "the time has other channels than the norm")
    is_new = time[0] not in slots
    slot = slots.setdefault(time[0], TimeSlot())
    slot.readers += 1
    insert = Insert(norm.module, _CHILD, AddAtPositions(slot), "receives the time that varies over positions")
    if not is_new:
        return [insert]
    what = "a second projection of the time, which varies over positions"
    return [AttachAfter(time[0], _CHILD, SecondProjection(time[1], slot), what, _project_again), insert]


def _project_again(layer: nn.Module, arguments: tuple[Any, ...], keywords: Any, output: Tensor) -> Tensor:
    layer.get_submodule(_CHILD)(arguments[0] if arguments else next(iter(keywords.values())))
    return output


def _plan_planes(model: nn.Module, injection: TimeInjection, filter_fn: Filter | None) -> list[Edit] | Change:
    users = injection.node.users
    path = users[0].module if len(users) == 1 else injection.node.module
    host = get_module(model, path)
    if not isinstance(host, _ConvNd):
        return Change(path, "the planes do not enter one convolution")
    norm = _first_taking(injection).module
    if filter_fn is not None and not filter_fn(get_module(model, norm), norm):
        return Change(norm, "not chosen by the filter")
    first = 0
    for operand in injection.node.target.args[0]:  # type: ignore[union-attr]
        if operand is injection.signal.target:
            break
        first += operand.meta["val"].shape[1]  # type: ignore[union-attr]
    return [Insert(path, _CHILD, PositionalPlane(first, first + injection.signal.shape[1]), "the time's planes vary over positions")]


def _layer_of(model: nn.Module, node: Node) -> tuple[str, nn.Linear | _ConvNd] | None:
    """The layer whose whole output, reshaped at most, is `node`."""
    size = node.numel
    while node.kind is Kind.VIEW and len(node.inputs) == 1 and node.numel == size:
        node = node.inputs[0]
    if node.kind is not Kind.WEIGHT or node.numel != size or len([user for user in node.users if user.kind is not Kind.VIEW]) > 1:
        return None
    module = get_module(model, node.module)
    return (node.module, module) if isinstance(module, (nn.Linear, _ConvNd)) else None


def _nothing(what: str, skipped: list[Change]) -> NothingMatchedError:
    fix = "bring the time in behind the norm: pl_normkit.nn.TimeAfterNorm, FiLMNorm" if skipped else "give inputs with the time as a tensor"
    return NothingMatchedError(what, evidence="; ".join(map(str, skipped)), fix=fix)


@dataclass(frozen=True)
class _SetValues:
    """Write `value` into the parameter `name` of the module at `path`."""

    path: str
    name: str
    value: Tensor
    what: str

    def check(self, model: nn.Module) -> None:
        if self._parameter(model).is_meta:
            raise EditError("values of a model on the meta device cannot be set", where=self.path)

    def is_done(self, model: nn.Module) -> bool:
        return torch.equal(self._parameter(model), self.value)

    def apply(self, model: nn.Module) -> tuple[Change, Undo]:
        parameter = self._parameter(model)
        before = parameter.detach().clone()

        def write(value: Tensor) -> None:
            with torch.no_grad():
                parameter.copy_(value)

        write(self.value)
        return Change(self.path, self.what), lambda: write(before)

    def _parameter(self, model: nn.Module) -> Tensor:
        return get_module(model, self.path).get_parameter(self.name)
